from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fmray.errors import CheckpointError, RequestError
from fmray.models.saved import load_dual_encoder
from fmray.serving.asks import Ask, ImageAsk, TextAsk
from fmray.serving.clip_engine import ClipEngine, Embedding
from fmray.serving.images import pixels_of
from tests.endpoint import picture

CPU = torch.device("cpu")


def engine_of(checkpoint: str) -> ClipEngine:
    return ClipEngine(load_dual_encoder(checkpoint, CPU), max_pixels=10**6)


def through(engine: ClipEngine, asks: list[Ask]) -> list[Embedding]:
    """Each by itself."""
    replies = []
    for ask in asks:
        (reply,) = engine.forward(engine.collate([engine.prepare(ask).value]))
        assert isinstance(reply, Embedding)
        replies.append(reply)
    return replies


def test_a_mixed_batch_is_what_the_model_says_of_each(checkpoint: str) -> None:
    loaded = load_dual_encoder(checkpoint, CPU)
    asks: list[Ask] = [
        TextAsk("red", "0"),
        ImageAsk(picture("red"), "1"),
        TextAsk("a blue one", "2"),
        ImageAsk(picture("blue"), "3"),
    ]
    replies = through(engine_of(checkpoint), asks)
    with torch.inference_mode():
        for ask, reply in zip(asks, replies, strict=True):
            if isinstance(ask, TextAsk):
                batch = loaded.tokenizer([ask.text], return_tensors="pt")
                expected = loaded.model.encode_text(batch["input_ids"], batch["attention_mask"])[0]
                assert reply.tokens == len(ask.text) + 2
            else:
                pixels = pixels_of([(ask.image, "")], loaded.image, max_pixels=10**6)
                assert pixels is not None
                expected = loaded.model.encode_image(pixels)[0]
                assert reply.tokens == 0
            torch.testing.assert_close(reply.vector_D, expected, atol=1e-6, rtol=0)
            assert reply.vector_D.norm().item() == pytest.approx(1, abs=1e-6)


def test_a_long_text_is_cut_and_says_so(checkpoint: str) -> None:
    engine = engine_of(checkpoint)
    fits, cut, same = through(
        engine, [TextAsk("a" * 10, "0"), TextAsk("a" * 11, "1"), TextAsk("a" * 500, "2")]
    )
    assert (fits.tokens, fits.truncated) == (12, False)
    assert (cut.tokens, cut.truncated) == (12, True)
    torch.testing.assert_close(fits.vector_D, same.vector_D)
    with pytest.raises(RequestError, match=r"input\[1\] has more than 12 tokens") as caught:
        engine.prepare(TextAsk("a" * 11, "input[1]", False))
    assert caught.value.code == "context_length_exceeded"


def test_capabilities_are_the_models(checkpoint: str, siglip_checkpoint: str) -> None:
    clip, siglip = engine_of(checkpoint).capabilities, engine_of(siglip_checkpoint).capabilities
    assert (clip.dim, clip.max_tokens, clip.image_size, clip.logit_bias) == (8, 12, 16, None)
    assert clip.logit_scale == pytest.approx(1 / 0.2)
    assert siglip.logit_bias == pytest.approx(-10)


def test_a_bad_picture_is_named_and_no_address_told(checkpoint: str) -> None:
    whole = picture(size=(200, 200))
    for length in (9, 40, len(whole) // 2):
        with pytest.raises(RequestError) as caught:
            engine_of(checkpoint).prepare(ImageAsk(whole[:length], "input[1]"))
        assert (caught.value.code, caught.value.param) == ("invalid_image", "input[1]")
        assert "0x" not in caught.value.message


def test_warm_up_finds_damaged_weights(checkpoint: str) -> None:
    engine_of(checkpoint).warmup()
    loaded = load_dual_encoder(checkpoint, CPU)
    with torch.no_grad():
        loaded.model.text_projection.weight[0, 0] = math.nan
    with pytest.raises(CheckpointError, match="not finite"):
        ClipEngine(loaded, max_pixels=1).warmup()


def test_preparing_in_several_threads_gives_the_same(checkpoint: str) -> None:
    """Fast tokenizers keep padding and cutting as state: two threads that set it panic."""
    engine = engine_of(checkpoint)
    asks = [TextAsk("a" * (1 + i % 14), "") for i in range(64)]
    alone = [engine.prepare(ask) for ask in asks]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(engine.prepare, asks))
    assert alone == together


def test_a_batch_is_what_each_is_alone(checkpoint: str) -> None:
    """Texts of other lengths and pictures beside it change nothing but the last bits."""
    engine = engine_of(checkpoint)
    for asks in (
        [TextAsk("red", ""), TextAsk("a longer", ""), TextAsk("a" * 30, "")],
        [ImageAsk(picture("red"), ""), ImageAsk(picture("blue", size=(9, 40)), "")],
    ):
        together = engine.forward(engine.collate([engine.prepare(ask).value for ask in asks]))
        for ask, reply in zip(asks, together, strict=True):
            assert isinstance(reply, Embedding)
            (alone,) = through(engine, [ask])
            torch.testing.assert_close(reply.vector_D, alone.vector_D, atol=1e-6, rtol=0)
            assert (reply.tokens, reply.truncated) == (alone.tokens, alone.truncated)


def test_a_row_that_is_not_a_number_fails_alone(checkpoint: str) -> None:
    """Weights of one token's row are damaged: only the text that has this token is told so."""
    loaded = load_dual_encoder(checkpoint, CPU)
    (letter,) = loaded.tokenizer.convert_tokens_to_ids(["z"])
    with torch.no_grad():
        loaded.model.text.get_input_embeddings().weight[letter] = math.nan
    engine = ClipEngine(loaded, max_pixels=1)
    items = [engine.prepare(TextAsk(text, "")).value for text in ("red", "zebra", "blue")]
    red, zebra, blue = engine.forward(engine.collate(items))
    assert isinstance(red, Embedding)
    assert isinstance(blue, Embedding)
    assert isinstance(zebra, RequestError)
    assert (zebra.status, zebra.code) == (500, "model_failed")
