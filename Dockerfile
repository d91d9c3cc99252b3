# A runtime and nothing of the controller.
#
# With wheels in .wheelhouse/ (`make wheelhouse`, for the same Python as the base image has) this
# builds without a network; else packages come from the index. The base needs python3 with venv and
# the GNU OpenMP library.
ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS packages
ARG TORCH=torch==2.13.0
COPY constraints.txt .wheelhouse* /wheels/
RUN python3 -m venv /opt/coldspark/python \
    && if ls /wheels/*.whl > /dev/null 2>&1; then offline="--no-index --find-links /wheels"; fi \
    && /opt/coldspark/python/bin/pip install --no-cache-dir --disable-pip-version-check \
        ${offline:-} --constraint /wheels/constraints.txt \
        "${TORCH}" grpcio llguidance numpy protobuf structlog \
    && /opt/coldspark/python/bin/pip uninstall --yes --quiet pip

FROM ${BASE_IMAGE}
COPY --from=packages /opt/coldspark/python /opt/coldspark/python
COPY runtime /opt/coldspark/source/runtime
COPY snapshots /opt/coldspark/source/snapshots
# Nothing can be written at run time, so byte code is made now and never checked against its source.
RUN /opt/coldspark/python/bin/python -m compileall -q --invalidation-mode unchecked-hash \
        /opt/coldspark/source
ENV PYTHONPATH=/opt/coldspark/source \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
WORKDIR /tmp
USER 65532:65532
ENTRYPOINT ["/opt/coldspark/python/bin/python", "-P", "-m", "runtime.main"]
