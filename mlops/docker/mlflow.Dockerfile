# MLflow's tracking server, for docker-compose.yml.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS packages
WORKDIR /build
COPY mlops/docker/locks/mlflow-py3.11.txt ./
RUN python3 -m venv --without-pip /opt/venv && python3 -m pip --python /opt/venv/bin/python install \
    --no-cache-dir --require-hashes --only-binary :all: -r mlflow-py3.11.txt

# hadolint ignore=DL3006
FROM ${BASE_IMAGE}
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin mlflow \
  && install -d -o 10001 -g 10001 /mlflow
COPY --from=packages /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 MLFLOW_DISABLE_TELEMETRY=true
WORKDIR /mlflow
USER 10001:10001
EXPOSE 5000
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:5000/health')"]
ENTRYPOINT ["mlflow", "server", "--host=0.0.0.0", "--port=5000", "--workers=1", \
  "--backend-store-uri=sqlite:////mlflow/mlflow.db", "--artifacts-destination=/mlflow/artifacts"]
