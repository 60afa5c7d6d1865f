"""A dual encoder behind FastAPI as people write it: `python -m fmray.benchmarks.serve_plain MODEL PORT`.

One picture a request: base64, Pillow, the model's own processor, a forward pass, a list of numbers. No queue, no batch.
"""

from __future__ import annotations

import base64
import io
import sys

import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel
from transformers import AutoImageProcessor, AutoModel

import fmray.models.clip  # noqa: F401 (registers our dual encoder with the auto classes)


class Picture(BaseModel):
    """`{"input": "data:image/png;base64,…"}`"""

    input: str


def build(folder: str) -> FastAPI:
    """The app of one model, of transformers' or ours."""
    model = AutoModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=False).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    own = hasattr(model, "encode_image")
    app = FastAPI()

    # `def`, not `async def`: FastAPI then answers in its threads, as its documentation says of work that blocks
    def embed(body: Picture) -> dict[str, list[float]]:
        encoded = base64.b64decode(body.input.partition(",")[2])
        picture = Image.open(io.BytesIO(encoded)).convert("RGB")
        # our encoder normalises by itself
        pixels = processor(images=picture, return_tensors="pt", do_normalize=not own)["pixel_values"]
        with torch.no_grad():
            if own:
                vector = model.encode_image(pixels)
            else:
                vector = model.get_image_features(pixel_values=pixels)
                vector = getattr(vector, "pooler_output", vector)
                vector = vector / vector.norm(dim=-1, keepdim=True)
        return {"embedding": vector[0].tolist()}

    def health() -> dict[str, str]:
        return {"status": "ok"}

    app.post("/embed")(embed)
    app.get("/health")(health)
    return app


def main() -> None:
    """Serve until told to stop."""
    torch.set_num_threads(1)
    folder, port = sys.argv[1:]
    uvicorn.run(build(folder), port=int(port), log_level="error", access_log=False)


if __name__ == "__main__":
    main()
