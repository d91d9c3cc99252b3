import errno
from collections.abc import Iterator

import grpc
import pytest
import torch

from runtime.errors import (
    GRPC_STATUS,
    LoadFailed,
    OutOfMemory,
    RuntimeFault,
    WrongState,
    as_fault,
    decode_fault,
    encode_fault,
)


def leaves(kind: type[RuntimeFault]) -> Iterator[type[RuntimeFault]]:
    yield kind
    for below in kind.__subclasses__():
        yield from leaves(below)


def test_every_fault_has_a_status() -> None:
    assert set(GRPC_STATUS) == set(leaves(RuntimeFault)) - {RuntimeFault}


@pytest.mark.parametrize("fault", GRPC_STATUS)
def test_every_status_is_one_of_grpcs(fault: type[RuntimeFault]) -> None:
    assert GRPC_STATUS[fault] in grpc.StatusCode.__members__


@pytest.mark.parametrize("fault", GRPC_STATUS)
def test_a_fault_keeps_class_and_message_between_processes(fault: type[RuntimeFault]) -> None:
    decoded = decode_fault(encode_fault(fault("line one\nline two: ü")))
    assert type(decoded) is fault
    assert str(decoded) == "line one\nline two: ü"


def test_foreign_errors_become_faults() -> None:
    fault = WrongState("busy")
    assert as_fault(fault) is fault
    assert isinstance(as_fault(MemoryError("17 GiB")), OutOfMemory)
    assert isinstance(as_fault(OSError(errno.ENOMEM, "Cannot allocate memory")), OutOfMemory)
    failed = as_fault(ValueError("bad shape"))
    assert isinstance(failed, LoadFailed)
    assert str(failed) == "ValueError: bad shape"


def test_torch_without_memory_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert isinstance(as_fault(caught.value), OutOfMemory)
    assert isinstance(as_fault(RuntimeError("shapes do not match")), LoadFailed)
