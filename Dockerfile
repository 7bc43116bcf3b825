# The server in an image, from a wheel for the same Python on Debian 12 or older:
#   python3.11 -m pip wheel --no-deps --wheel-dir dist .
#   docker build --tag et-moe .
#   docker run --rm --publish 8000:8000 --volume "$PWD/program:/program:ro" et-moe
# With a GPU, by the NVIDIA Container Toolkit: docker run --gpus all ...
FROM python:3.11-slim-bookworm

# What the container toolkit takes into the container: libcuda, and nvidia-smi.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility

COPY dist/et_moe-*.whl /tmp/dist/
# The wheel says which versions it takes.
# hadolint ignore=DL3013
RUN wheel=$(echo /tmp/dist/et_moe-*.whl) \
    && pip install --no-cache-dir "${wheel}[serve]" \
    && rm -r /tmp/dist \
    && useradd --create-home --uid 10001 et-moe

USER 10001
EXPOSE 8000
# 503 while the server ends or once the device has failed; a model may take minutes to load.
HEALTHCHECK --start-period=300s --timeout=10s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=8)"]
ENTRYPOINT ["et-moe", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["/program"]
