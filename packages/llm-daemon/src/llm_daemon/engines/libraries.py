"""Things people know as engines that do not serve: named with the reason, so that nobody looks for their adapter."""

from __future__ import annotations

# name -> (licence, why it cannot be an engine here, what to do instead)
LIBRARIES: dict[str, tuple[str, str, str]] = {
    "onnxruntime-genai": (
        "MIT",
        "ONNX Runtime GenAI is a library without a server, and its models must be converted first",
        "give a GGUF build of the same model; or put a server of your own around it and describe it to the engine `command`",
    ),
    "ctranslate2": (
        "MIT",
        "CTranslate2 is a library without a server, for converted models",
        "give a GGUF build of the same model",
    ),
    "tensorrt-llm": (
        "Apache-2.0",
        "trtllm-serve needs an NVIDIA GPU and compiled engines; it is not supported yet",
        "start it yourself and describe it to the engine `command`",
    ),
}
