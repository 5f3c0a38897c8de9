# The HTTP server of a saved classifier on CPUs, without PyTorch. hadolint has checked this file; it was never built or run.
#
#   docker build -t iosr-fast .
#   docker run --read-only --tmpfs /tmp -p 127.0.0.1:8000:8000 -v "$PWD/my-classifier:/classifier:ro" iosr-fast \
#       /classifier --public-host localhost
#
# Options of `iosr-fast serve` follow the image's name; this one keeps scripts of other sites out of a local port.
# EXTRAS=cpu adds PyTorch, to fit and to export.
FROM python:3.13-bookworm AS build
WORKDIR /src
COPY . .
ENV IOSR_FAST_EXTENSION=required
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.13-slim-bookworm
ARG EXTRAS=serve
# The wheel stays in the other stage, and the versions are those that the tests passed with.
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    --mount=type=bind,source=constraints.txt,target=/constraints.txt \
    pip install --no-cache-dir --only-binary :all: --constraint /constraints.txt "$(echo /wheels/*.whl)[${EXTRAS}]" \
    && useradd --uid 10001 --create-home iosr
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["iosr-fast", "serve", "--host", "0.0.0.0"]
CMD ["/classifier"]
