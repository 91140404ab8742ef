"""Models of transformers, tiny and random, on cuflash: logits and gradients of eager attention, generation token by token. Skipped without transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cuflash.torch
from cuflash.errors import OptionError, UnsupportedError
from cuflash.planning.planner import make_plan
from cuflash.runtime import cache_calls, calls
from cuflash.torch import register_transformers, transformers

hf = pytest.importorskip("transformers")

SEQLEN, TOKENS = 24, 50
_TEXT = {
    "vocab_size": TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
_ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _TEXT),
    "mistral_window": ("MistralForCausalLM", "MistralConfig", {**_TEXT, "sliding_window": 8}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _TEXT),
    "gemma2_softcap": (
        "Gemma2ForCausalLM", "Gemma2Config", {**_TEXT, "sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    ),
    "gpt_oss_sinks": (
        "GptOssForCausalLM", "GptOssConfig", {**_TEXT, "sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "bert": ("BertForMaskedLM", "BertConfig", {**_ENCODER, "vocab_size": TOKENS, "max_position_embeddings": 64}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {
        "vocab_size": TOKENS, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0, "decoder_start_token_id": 0,
    }),
    "vit": ("ViTForImageClassification", "ViTConfig", {**_ENCODER, "image_size": 16, "patch_size": 4, "num_labels": 5}),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", {
        "vocab_size": TOKENS, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 24, "max_target_positions": 32, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
    }),
}  # fmt: skip
GENERATING = [(kind, cache) for kind in ("llama", "mistral_window", "gemma2_softcap", "gpt_oss_sinks") for cache in ("dynamic", "static")]


def make(kind: str, implementation: str, device: Any) -> Any:
    """The same model whatever the implementation."""
    model_name, config_name, sizes = MODELS[kind]
    torch.manual_seed(1)
    config = getattr(hf, config_name)(**sizes)
    model = getattr(hf, model_name)._from_config(config, attn_implementation=implementation).to(device).float().eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter)
    return model


def tokens(device: Any) -> tuple[Any, Any]:
    """Two rows, the second one padded at its beginning."""
    ids = torch.randint(3, TOKENS, (2, SEQLEN), generator=torch.Generator().manual_seed(2)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    return ids, mask


def arguments(kind: str, device: Any) -> tuple[dict[str, Any], Any]:
    """What the model takes, and which positions of its logits are looked at."""
    ids, mask = tokens(device)
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, device=device)}, torch.ones(2, dtype=torch.bool, device=device)
    if kind == "whisper":
        return {"input_features": torch.randn(2, 8, 48, device=device), "decoder_input_ids": ids}, torch.ones_like(ids, dtype=torch.bool)
    if kind == "t5":
        decoder_mask = mask.flip(1)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": ids,
            "decoder_attention_mask": decoder_mask,
        }, decoder_mask.bool()
    return {"input_ids": ids, "attention_mask": mask}, mask.bool()


@pytest.mark.parametrize("kind", MODELS)
def test_logits_and_gradients_are_those_of_eager_attention(device: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, looked_at = arguments(kind, device)
    results = []
    calls = []
    run = transformers.scaled_dot_product_attention
    monkeypatch.setattr(
        transformers, "scaled_dot_product_attention", lambda *args, **options: calls.append(options) or run(*args, **options)
    )
    for implementation in ("eager", register_transformers()):
        model = make(kind, implementation, device)
        logits = model(**given).logits[looked_at]
        logits.square().mean().backward()
        results.append((logits.detach(), {name: x.grad for name, x in model.named_parameters() if x.grad is not None}))
    assert len(calls) >= 2
    (want, want_grads), (got, got_grads) = results
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert got_grads.keys() == want_grads.keys()
    for name, grad in want_grads.items():
        torch.testing.assert_close(
            got_grads[name], grad, rtol=1e-3, atol=1e-5 * (1.0 + float(grad.abs().max())), msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.sample(2)
@pytest.mark.parametrize(("kind", "cache"), GENERATING)
def test_generation_is_that_of_eager_attention(device: Any, kind: str, cache: str) -> None:
    """Greedy, of a padded batch, past the window."""
    ids, mask = tokens(device)
    generated = []
    for implementation in ("eager", register_transformers()):
        model = make(kind, implementation, device)
        model.generation_config.pad_token_id = 0
        with torch.no_grad():
            generated.append(
                model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=6,
                    min_new_tokens=6,
                    do_sample=False,
                    cache_implementation=cache,
                    disable_compile=True,
                )
            )
    assert generated[0].shape[1] > SEQLEN
    assert torch.equal(*generated)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_steps_of_16_bits_take_the_kernel_for_few_queries(device: Any, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token as eager attention; a static cache is read as far as its mask shows a key, which is looked for once for all layers."""
    monkeypatch.setenv("CUFLASH_DECODE", "1")
    if device.type == "cpu":
        monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_80")
    ids, mask = tokens(device)
    planned: list[Any] = []
    monkeypatch.setattr(calls, "make_plan", lambda *args, **options: planned.append(make_plan(*args, **options)) or planned[-1])
    calls.forget()
    run, lengths = transformers.scaled_dot_product_attention, []
    monkeypatch.setattr(
        transformers,
        "scaled_dot_product_attention",
        lambda *args, **options: lengths.append(options["seqlens_kv"]) or run(*args, **options),
    )
    generated = []
    for implementation in ("eager", register_transformers()):
        model = make("llama", implementation, device).half()
        with torch.no_grad():
            generated.append(
                model.generate(
                    ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, cache_implementation=cache, disable_compile=True,
                )
            )  # fmt: skip
    assert torch.equal(*generated)
    steps = [plan for plan in planned if plan.problem.seqlen_q == 1]
    assert steps
    assert all("forward_split" in [kernel.name for kernel in plan.kernels] for plan in steps)
    shown = [x.tolist() for x in lengths if x is not None]
    assert shown == [[SEQLEN + step] * 2 for step in (1, 2, 3) for _layer in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_padding_are_those_of_eager_attention(device: Any, dtype: Any) -> None:
    """The most negative number of the type, added: beside other keys it hides one, and a row that has nothing else gets the mean of all values."""
    query, key, value, grad = (torch.randn(2, 2, SEQLEN, 16, device=device, dtype=dtype) for _ in range(4))
    mask = torch.zeros(2, 1, SEQLEN, SEQLEN, device=device, dtype=dtype)
    mask[1, :, :, :7] = mask[1, :, :7] = mask[0, :, 5] = torch.finfo(dtype).min

    def eager(query: Any, key: Any, value: Any) -> Any:
        return torch.softmax(query @ key.mT * 0.25 + mask, -1, dtype=torch.float32).to(query.dtype) @ value

    def ours(query: Any, key: Any, value: Any) -> Any:
        return transformers.attention(None, query, key, value, mask, scaling=0.25)[0].transpose(1, 2)

    results = []
    for attend in (eager, ours):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        out = attend(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, **({"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.02}))
    torch.testing.assert_close(results[1][0][0, :, 5], value[0].mean(1), rtol=0.02, atol=0.01)


def test_what_a_mask_shows_is_looked_for_again_when_it_is_written_to() -> None:
    query, key = torch.zeros(2, 2, 1, 16), torch.zeros(2, 1, 6, 16)
    mask = torch.zeros(2, 1, 1, 6, dtype=torch.bool)
    with torch.no_grad():
        for end in (0, 4):
            mask[1, ..., :end] = True
            assert transformers._shown_lengths(mask, query, key).tolist() == [0, end]
        assert transformers._shown_lengths(mask[1:], query, key).tolist() == [4, 4]
        for other in (None, mask.float(), mask[..., :5]):
            assert transformers._shown_lengths(other, query, key) is None
    assert transformers._shown_lengths(mask, query, key) is None  # gradients may be wanted
    with torch.inference_mode():
        fresh = mask.clone()
        for end in (5, 6):  # writes to it are not counted
            fresh[0, ..., :end] = True
            assert transformers._shown_lengths(fresh, query, key).tolist() == [end, 4]


def test_a_name_that_transformers_takes_for_another_is_refused() -> None:
    with pytest.raises(OptionError, match="name: got 'cuflash'"):
        register_transformers("cuflash")
    with pytest.raises(UnsupportedError, match="output_attentions: got True"):
        transformers.attention(None, None, None, None, None, output_attentions=True)


# --- Pages of KVCache ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma2_softcap", "gpt_oss_sinks"])
def test_generation_with_pages_is_that_of_a_dynamic_cache(device: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a padded batch, past the window and into a second page, in 16 bits; one launch appends and attends."""
    if device.type == "cpu":
        monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_80")
    ids, mask = tokens(device)
    planned: list[Any] = []
    monkeypatch.setattr(cache_calls, "make_plan", lambda *args, **options: planned.append(make_plan(*args, **options)) or planned[-1])
    calls.forget()
    model = make(kind, register_transformers(), device).half()
    model.generation_config.pad_token_id = 0
    given = {"attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "disable_compile": True}
    pages = cuflash.torch.transformers_cache(page_size=16)
    with torch.no_grad():
        want, got = model.generate(ids, **given), model.generate(ids, past_key_values=pages, **given)
    assert torch.equal(want, got)
    assert pages.get_seq_length() == SEQLEN + 11
    assert any(plan.problem.seqlen_q == 1 and plan.kernels[0].name == "forward_split" for plan in planned)


def test_pages_go_on_with_a_chat(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second prompt behind what was generated, after some of it was forgotten; rows without padding."""
    if device.type == "cpu":
        monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_80")
    ids, _ = tokens(device)
    model = make("llama", register_transformers(), device).half()
    logits = []
    for cache in (hf.DynamicCache(config=model.config), cuflash.torch.transformers_cache(page_size=16)):
        with torch.no_grad():
            model(ids, past_key_values=cache)
            cache.crop(-5)
            logits.append(model(ids[:, :7], past_key_values=cache).logits)
        assert cache.get_seq_length() == SEQLEN + 2
        cache.reset()
        assert cache.get_seq_length() == 0
    torch.testing.assert_close(*logits, rtol=2e-3, atol=2e-3)


def test_pages_refuse_what_they_cannot_do(device: Any) -> None:
    """Another attention would see the new keys alone; beams need their own rows."""
    ids, _ = tokens(device)
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedError, match=r"past_key_values: got a cuflash\.torch\.transformers_cache with another attention"),
    ):
        make("llama", "eager", device).half()(ids, past_key_values=cuflash.torch.transformers_cache())
    cache = cuflash.torch.transformers_cache()
    model = make("llama", register_transformers(), device).half()
    with torch.no_grad(), pytest.raises(UnsupportedError, match=r"past_key_values: got (beams|repeated rows|a choice of rows)"):
        model.generate(ids, num_beams=2, max_new_tokens=3, past_key_values=cache, disable_compile=True)
