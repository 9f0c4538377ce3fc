# The caption server as an image: two stages, no root, nothing written outside /tmp and /var/cache/etenet.
#
#   docker build -t etenet .
#   docker run --rm --read-only --tmpfs /tmp:size=4g -p 8080:8080 -p 127.0.0.1:8083:8083 etenet
#
# To use a GPU: docker run --gpus all --volume etenet-compiled:/var/cache/etenet. The volume keeps the code that torch
# compiles for the GPU, with the C++ compiler of the image. For a CPU only, this saves 5 GB:
# docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t etenet .
# The argument CHECKPOINT is the checkpoint to serve.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
ARG TORCH_INDEX=""
ARG CHECKPOINT=model_store/real.pt
WORKDIR /app
RUN python -m venv /opt/etenet
COPY pyproject.toml constraints.txt README.md LICENSE config.properties ./
COPY src src
COPY handler handler
COPY training training
COPY model_store/real.pt model_store/MODEL_CARD.md model_store/
RUN if [ -n "$TORCH_INDEX" ]; then \
        PIP_INDEX_URL="$TORCH_INDEX" /opt/etenet/bin/pip install --no-cache-dir --no-deps --constraint constraints.txt \
            torch torchvision; \
    fi && \
    /opt/etenet/bin/pip install --no-cache-dir --constraint constraints.txt '.[telemetry]'
COPY ${CHECKPOINT} checkpoint.pt
RUN /opt/etenet/bin/etenet package checkpoint.pt --out archive/etenet.mar

FROM python:${PYTHON}-slim-bookworm
# Debian removes old versions, so none can be pinned.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends g++ tini && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --uid 10001 --no-create-home --home-dir /tmp etenet && \
    install --directory --owner etenet /var/cache/etenet
COPY --from=build /opt/etenet /opt/etenet
COPY --from=build /app/archive /app/model_store
COPY deploy/container.properties /app/config.properties
ENV PATH=/opt/etenet/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    XDG_CACHE_HOME=/var/cache NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /app
USER 10001
EXPOSE 8080 8082 8083
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=620s --interval=10s --timeout=5s --retries=3 \
    CMD ["python", "-c", "from urllib.request import ProxyHandler, build_opener; \
         build_opener(ProxyHandler({})).open('http://127.0.0.1:8083/ready', timeout=4)"]
ENTRYPOINT ["tini", "--", "etenet", "serve"]
