"""How a model's author turns token vectors into one: sentence-transformers' files, as one of ours.

The snapshot keeps `pooling.json`: {"mode", "normalize", "max_tokens"}; without it nobody has said.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snapshots.errors import SourceInvalid, SourceUnsupported
from snapshots.sources.companions import write_json
from snapshots.sources.paths import read_json, read_json_list

POOLING_FILE = "pooling.json"
MAX_TOKENS = 1 << 24
MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
MODULES = ("Transformer", "Pooling", "Normalize")


def write_pooling(directory: Path, files: Mapping[str, Path]) -> None:
    """Write pooling.json if the source is a sentence-transformers model.

    Args:
        directory: Where to.
        files: Those of POOLING_FILES that the source has.

    Raises:
        SourceUnsupported: It has a module, or pools in a way, that is not computed here.
        SourceInvalid: A file is malformed.
    """
    if "modules.json" not in files:
        return
    modules = [_module(entry) for entry in read_json_list(files["modules.json"])]
    unknown = [name for name in modules if name not in MODULES]
    if unknown:
        raise SourceUnsupported(
            f"modules.json: the module {unknown[0]!r} is not supported "
            f"(known: {', '.join(MODULES)})"
        )
    pooling = files.get("1_Pooling/config.json")
    length = files.get("sentence_bert_config.json")
    content = {
        "mode": "mean" if pooling is None else _mode(read_json(pooling)),
        "normalize": "Normalize" in modules,
        "max_tokens": None if length is None else _max_tokens(read_json(length)),
    }
    write_json(directory / POOLING_FILE, content)


def _module(entry: object) -> str:
    kind = entry.get("type") if isinstance(entry, dict) else None
    if not isinstance(kind, str):
        raise SourceInvalid("modules.json has an entry without a type")
    return kind.rpartition(".")[2]


def _mode(config: Mapping[str, Any]) -> str:
    chosen = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    if len(chosen) != 1 or chosen[0] not in MODES:
        raise SourceUnsupported(
            f"1_Pooling/config.json: pooling by {chosen} is not supported "
            f"(known: one of {', '.join(MODES)})"
        )
    return MODES[chosen[0]]


def _max_tokens(config: Mapping[str, Any]) -> int | None:
    value = config.get("max_seq_length")
    if value is not None and (type(value) is not int or not 1 <= value <= MAX_TOKENS):
        raise SourceInvalid(f"sentence_bert_config.json: max_seq_length is {value!r}")
    return value
