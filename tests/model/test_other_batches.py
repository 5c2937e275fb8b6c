"""Batches that models make inside: each sample as alone, or a refusal whose way out works."""

from typing import Any

import pytest
import torch
from batches import add_adapters, assert_equal, differ, with_adapter
from torch import Tensor, nn
from vision_language import noise

import lora_mux
from lora_mux.errors import RoutingError
from peft_oracle import transformers as T

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = ["a", "b", None]
SMALL: dict[str, Any] = {
    **{"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0},
    **{"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "bos_token_id": 1, "eos_token_id": 2},
}


def attached(model: nn.Module, *targets: str, size: float = 0.3) -> tuple[Any, lora_mux.Mux]:
    mux = lora_mux.attach(model.eval(), list(targets) or "all-linear")
    add_adapters(model, mux, size=size)
    return model, mux


def rows_are_as_alone(mux: lora_mux.Mux, compute: Any, rows: Any = ROWS, **how: Any) -> None:
    """compute() with mixed rows, and with each row for all samples. Both return [samples, ...]."""
    with mux.route(rows, **how):
        got = compute()
    want = [with_adapter(mux, row, compute) for row in rows]
    assert differ(want[0].float(), want[-1].float())
    for i, each in enumerate(want):
        assert_equal(got[i].float(), each[i].float())


def whisper() -> Any:
    torch.manual_seed(0)
    config = T.WhisperConfig(
        **SMALL | {"eos_token_id": 50, "vocab_size": 64 + 51},
        max_source_positions=50,
        max_target_positions=40,
        num_mel_bins=8,
        decoder_start_token_id=51,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    model = T.WhisperForConditionalGeneration(config)
    model.generation_config.no_timestamps_token_id = 63  # timestamps begin behind it
    model.generation_config.is_multilingual = False
    model.generation_config.max_initial_timestamp_index = None
    return attached(model, size=0.5)


class TestWhisper:
    @pytest.mark.parametrize("beams", [1, 2])
    def test_short(self, beams: int) -> None:
        model, mux = whisper()
        features = noise(3, 8, 100)

        def run() -> Tensor:
            found = model.generate(features, max_new_tokens=6, num_beams=beams)
            return nn.functional.pad(found, (0, 10 - found.shape[1]))

        rows_are_as_alone(mux, run)

    @pytest.mark.parametrize("beams", [1, 2])
    def test_long(self, beams: int) -> None:
        """Samples of different lengths: those that are finished leave the batch."""
        model, mux = whisper()
        lengths = (120, 450, 260)
        parts = [noise(1, 8, length, seed=length) for length in lengths]
        features = torch.cat([nn.functional.pad(part, (0, 450 - part.shape[2])) for part in parts])
        mask = (torch.arange(450) < torch.tensor(lengths)[:, None]).long()
        how = {"return_timestamps": True, "max_new_tokens": 8, "num_beams": beams}

        def run(features: Tensor, **more: Any) -> list[list[int]]:
            found = model.generate(features, return_segments=True, **how, **more)["segments"]
            return [[t for s in segments for t in s["tokens"].tolist()] for segments in found]

        passes = []
        hook = model.register_forward_hook(lambda *given: passes.append(given[2].logits.shape[0]))
        with mux.route(ROWS):
            got = run(features, attention_mask=mask)
        hook.remove()
        assert {1, 2, 3} <= {samples // beams for samples in passes}
        base = [run(part)[0] for part in parts]
        for i, row in enumerate(ROWS):
            want = with_adapter(mux, row, lambda i=i: run(parts[i]))[0]
            assert got[i] == want
            assert row is None or want != base[i]

    def test_sequences(self) -> None:
        """Whisper repeats samples for their sequences before anything else."""
        model, mux = whisper()
        features = noise(2, 8, 100)
        seen = []
        layer = model.model.encoder.layers[0].fc1
        layer.register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
        with mux.route(["a", "b"]):
            model.generate(features, max_new_tokens=2, num_return_sequences=2, do_sample=True)
        x, y = seen[-1]
        assert len(x) == 4
        for i, name in enumerate("aabb"):
            assert_equal(y[i], with_adapter(mux, name, lambda i=i: layer(x[i : i + 1]))[0])

    def test_samples_that_are_computed_again(self) -> None:
        """Nothing tells which ones these are."""
        model, mux = whisper()
        how = {"temperature": (0.0, 0.4), "logprob_threshold": 0.0, "max_new_tokens": 4}
        with mux.route(ROWS), pytest.raises(RoutingError, match="`temperature` must be one number"):
            model.generate(noise(3, 8, 100), **how)
        with mux.route(["a"] * 3):  # the way out
            model.generate(noise(3, 8, 100), **how)


def musicgen() -> Any:
    torch.manual_seed(0)
    text = T.T5Config(
        vocab_size=64, d_model=32, d_ff=48, d_kv=16, num_layers=1, num_heads=2, pad_token_id=0
    )
    audio = T.EncodecConfig(
        **{"hidden_size": 16, "num_filters": 4, "upsampling_ratios": [2, 2], "codebook_dim": 16},
        **{"codebook_size": 64, "num_lstm_layers": 1, "target_bandwidths": [48.0]},
        **{"sampling_rate": 8000},
    )
    decoder = T.MusicgenDecoderConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_codebooks=4,
        pad_token_id=64,
        bos_token_id=64,
    )
    config = T.MusicgenConfig(
        text_encoder=text.to_dict(), audio_encoder=audio.to_dict(), decoder=decoder.to_dict()
    )
    model = T.MusicgenForConditionalGeneration(config)
    model.generation_config.decoder_start_token_id = 64
    model.generation_config.pad_token_id = 64
    return attached(model, size=0.5)


def janus() -> Any:
    torch.manual_seed(0)
    shared = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = T.models.janus.JanusVisionConfig(
        **shared, image_size=16, patch_size=8, projection_dim=32, mlp_ratio=2, num_image_tokens=4
    )
    vq = T.models.janus.JanusVQVAEConfig(
        **{"embed_dim": 8, "num_embeddings": 64, "double_latent": False, "latent_channels": 16},
        **{"num_patches": 2, "base_channels": 32, "channel_multiplier": [1, 1]},
        **{"num_res_blocks": 1, "image_token_embed_dim": 32, "projection_dim": 32},
    )
    text = T.LlamaConfig(
        **shared, vocab_size=64, intermediate_size=48, pad_token_id=1, eos_token_id=None
    )
    config = T.JanusConfig(text_config=text, vision_config=vision, vq_config=vq, image_token_id=5)
    model = T.JanusForConditionalGeneration(config)
    own = model.generation_config
    own.generation_kwargs, own.bos_token_id, own.pad_token_id = {"boi_token_id": 7}, 0, 1
    return attached(model, size=0.5)


class TestGuidance:
    @torch.no_grad()
    def test_janus(self) -> None:
        """It doubles the batch for guidance inside generate(): a, b, a, b."""
        model, mux = janus()
        ids = torch.tensor([[0, 20, 21], [0, 30, 31], [0, 40, 41]])

        def run(**how: Any) -> Tensor:
            logits: list[Tensor] = []
            head = model.model.generation_head
            hook = head.register_forward_hook(lambda m, args, y: logits.append(y))
            how |= {"generation_mode": "image", "guidance_scale": 2.0, "do_sample": True}
            how["top_k"] = 1  # sampling that is greedy
            model.generate(ids, attention_mask=torch.ones_like(ids), **how)
            hook.remove()
            return torch.stack(logits, 1).unflatten(0, (2, -1)).transpose(0, 1)

        rows_are_as_alone(mux, run, expand="tile")
        with mux.route(ROWS), pytest.raises(RoutingError, match=r"\(6\), got 3.*expand"):
            run()
        with mux.route(ROWS, expand="tile"), pytest.raises(RoutingError, match="guidance and"):
            run(num_return_sequences=2)
        both = {"interleave": 2, "tile": 2}  # the way out

        def several() -> Tensor:
            return run(num_return_sequences=2).unflatten(0, (3, 2))

        rows_are_as_alone(mux, several, expand=both)

    @torch.no_grad()
    @pytest.mark.parametrize("scale", [None, 3.0])
    def test_musicgen(self, scale: float | None) -> None:
        """Its decoder's batch has a row for each codebook, and twice as many with guidance."""
        model, mux = musicgen()
        ids = torch.tensor([[5, 6, 7, 1], [9, 3, 2, 1], [20, 30, 40, 1]])

        def run(**how: Any) -> Tensor:
            logits = []
            heads = model.decoder.lm_heads[0]
            hook = heads.register_forward_hook(lambda m, args, y: logits.append(y))
            model.generate(
                input_ids=ids, max_new_tokens=6, guidance_scale=scale, do_sample=False, **how
            )
            hook.remove()
            return torch.stack([step[:, -1] for step in logits], 1)

        rows_are_as_alone(mux, run, expand=None if scale is None else "tile")
        if scale is None:
            return
        with mux.route(ROWS), pytest.raises(RoutingError, match=r"\(6\), got 3.*expand"):
            run()
        for expand in (None, "tile"):
            with mux.route(ROWS, expand=expand), pytest.raises(RoutingError, match="guidance and"):
                run(num_return_sequences=2)

    @torch.no_grad()
    def test_the_decoder_of_musicgen_alone(self) -> None:
        whole, mux = musicgen()
        mux.detach()
        model, mux = attached(whole.decoder, size=0.5)
        ids = torch.randint(0, 64, (12, 5))  # four codebooks of each sample
        rows_are_as_alone(mux, lambda: model(input_ids=ids).logits.unflatten(0, (3, 4)))
        with mux.route(["a", "b"]), pytest.raises(RoutingError, match=r"\(3\), got 2"):
            model(input_ids=ids)
        with mux.route(ROWS), pytest.raises(RoutingError, match=r"\(10\), got 3"):
            model(input_ids=ids[:10])  # of nobody knows which samples

    @torch.no_grad()
    def test_of_text(self) -> None:
        """The base's logits come from passes with a batch of their own, in the same order."""
        torch.manual_seed(0)
        config = T.LlamaConfig(
            **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0},
            **{"num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": None},
        )
        model, mux = attached(T.LlamaForCausalLM(config))
        ids = torch.tensor([[5, 6, 7], [9, 3, 2], [20, 30, 40]])
        how = {"max_new_tokens": 5, "do_sample": False, "guidance_scale": 2.5}
        rows_are_as_alone(mux, lambda: model.generate(ids, **how))

        def several() -> Tensor:
            how["num_beams"] = how["num_return_sequences"] = 2
            return model.generate(ids, **how).unflatten(0, (3, 2))

        rows_are_as_alone(mux, several)

    def test_repetition_by_generate_and_by_expand(self) -> None:
        """Both say four, in other orders."""
        config = T.LlamaConfig(
            **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0},
            **{"num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": None},
        )
        model, mux = attached(T.LlamaForCausalLM(config))
        ids = torch.tensor([[5, 6, 7], [9, 3, 2], [20, 30, 40]])
        with mux.route(ROWS, expand={"interleave": 2, "tile": 2}):
            with pytest.raises(RoutingError, match="`expand` must be None where generate"):
                model.generate(ids, num_beams=4, max_new_tokens=2)

    def test_assisted(self) -> None:
        torch.manual_seed(0)
        config = T.LlamaConfig(
            **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0},
            **{"num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": None},
        )
        model, mux = attached(T.LlamaForCausalLM(config))
        ids, how = torch.tensor([[5, 6, 7]]), {"max_new_tokens": 8, "do_sample": False}
        helper = T.LlamaForCausalLM(config).eval()
        with mux.route(["a"]):
            got = model.generate(ids, assistant_model=helper, **how)
        assert got.tolist() == with_adapter(mux, "a", lambda: model.generate(ids, **how)).tolist()


class TestEncoderDecoders:
    def test_bart(self) -> None:
        torch.manual_seed(0)
        model, mux = attached(T.BartForConditionalGeneration(T.BartConfig(**SMALL)), size=0.5)
        ids = torch.tensor([[5, 6, 7, 2], [9, 3, 8, 2], [20, 30, 40, 2]])
        how = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 2}
        rows_are_as_alone(mux, lambda: model.generate(ids, **how))

    def test_trocr(self) -> None:
        """The images are the batch: there is no other input."""
        torch.manual_seed(0)
        vision = T.ViTConfig(
            **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "image_size": 16, "patch_size": 8},
        )
        text = T.TrOCRConfig(**SMALL, cross_attention_hidden_size=32)
        config = T.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
        config.decoder_start_token_id, config.pad_token_id = 1, 0
        model = T.VisionEncoderDecoderModel(config)
        model.generation_config.decoder_start_token_id = 1
        model.generation_config.pad_token_id = 0
        model, mux = attached(model, size=0.5)
        how = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 2}
        images = noise(3, 3, 16, 16)
        rows_are_as_alone(mux, lambda: model.generate(images, **how))


class TestOtherOrders:
    @torch.no_grad()
    def test_deberta(self) -> None:
        """Its table of positions has no batch, and counts only where an adapter touches it."""
        torch.manual_seed(0)
        config = T.DebertaV2Config(
            **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0},
            **{"num_hidden_layers": 1, "num_attention_heads": 2, "relative_attention": True},
            **{"pos_att_type": ["c2p", "p2c"], "position_buckets": 4, "share_att_key": False},
        )
        model = T.DebertaV2Model(config).eval()
        mux = lora_mux.attach(model)
        add_adapters(model, mux, touches=lambda path: "pos" not in path)
        add_adapters(model, mux, "cd")
        ids = torch.tensor([[5, 6, 7, 2], [9, 3, 8, 2], [20, 30, 40, 2]])
        rows_are_as_alone(mux, lambda: model(ids).last_hidden_state)
        with mux.route(["c", "d", None]), pytest.raises(RoutingError, match="unless all `rows`"):
            model(ids)
        with mux.route(["c"] * 3):  # the way out
            got = model(ids).last_hidden_state
        assert_equal(got, with_adapter(mux, "c", lambda: model(ids).last_hidden_state))

    @torch.no_grad()
    @pytest.mark.parametrize("samples", [3, 1])
    def test_swin(self, samples: int) -> None:
        torch.manual_seed(0)
        config = T.SwinConfig(
            **{"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1]},
            **{"num_heads": [2, 2], "window_size": 2},
        )
        model = T.SwinModel(config).eval()
        images = noise(samples, 3, 16, 16)
        mux = lora_mux.attach(model)
        add_adapters(model, mux)
        rows = ROWS[:samples]
        if samples == 1:
            with mux.route(rows):
                got = model(images).last_hidden_state
            assert_equal(got, with_adapter(mux, "a", lambda: model(images).last_hidden_state))
            return
        with mux.route(rows), pytest.raises(RoutingError, match="leave the layer out of"):
            model(images)
        mux.detach()
        model, mux = attached(model, "intermediate.dense", "reduction")  # the way out
        rows_are_as_alone(mux, lambda: model(images).last_hidden_state)

    @torch.no_grad()
    def test_choices(self) -> None:
        torch.manual_seed(0)
        config = T.BertConfig(
            **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0},
            **{"num_hidden_layers": 1, "num_attention_heads": 2},
        )
        model, mux = attached(T.BertForMultipleChoice(config))
        ids = torch.randint(1, 64, (3, 2, 5))
        with mux.route(ROWS), pytest.raises(RoutingError, match=r"\(6\), got 3.*interleave"):
            model(ids)
        rows_are_as_alone(mux, lambda: model(ids).logits, expand="interleave")
        with mux.route(["a", None, None, "b", "b", "a"]):  # one for each choice
            got = model(input_ids=ids).logits
        assert_equal(got[0, :1], with_adapter(mux, "a", lambda: model(ids).logits)[0, :1])
        assert_equal(got[1, 1:], with_adapter(mux, "b", lambda: model(ids).logits)[1, 1:])

    @torch.no_grad()
    @pytest.mark.parametrize("samples", [4, 3])
    @pytest.mark.parametrize("kind", ["xlnet", "longformer", "torch"])
    def test_tokens_first(self, kind: str, samples: int) -> None:
        """Also where there are as many tokens as samples."""
        torch.manual_seed(0)
        if kind == "xlnet":
            config = T.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=2, d_inner=48)
            model: Any = T.XLNetModel(config)
        elif kind == "longformer":
            config = T.LongformerConfig(
                **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48},
                **{"num_hidden_layers": 1, "num_attention_heads": 2, "attention_window": 4},
                **{"pad_token_id": 0, "max_position_embeddings": 30},
            )
            model = T.LongformerModel(config)
        else:
            model = Translator()
        model, mux = attached(model, size=0.5)
        ids = torch.randint(1, 64, (samples, 4))
        rows = [*ROWS, "b"][:samples]
        if kind == "torch":
            rows_are_as_alone(mux, lambda: model(ids), rows)
        else:
            rows_are_as_alone(mux, lambda: model(ids).last_hidden_state, rows)

    @pytest.mark.parametrize(
        "expand", ["interleave", "tile", {"interleave": 2, "tile": 3}], ids=str
    )
    @torch.no_grad()
    def test_tokens_first_of_repeated_samples(self, expand: Any) -> None:
        torch.manual_seed(0)
        model, mux = attached(Translator(), size=0.5)
        ids = torch.randint(1, 64, (3, 4))
        batch = {"interleave": ids.repeat_interleave(2, 0), "tile": ids.repeat(2, 1)}
        asked = batch[expand] if isinstance(expand, str) else batch["interleave"].repeat(3, 1)
        with mux.route(ROWS, expand=expand):
            got = model(asked)
        for i, sample in enumerate(asked):
            row = ROWS[next(j for j in range(3) if torch.equal(ids[j], sample))]
            assert_equal(got[i], with_adapter(mux, row, lambda: model(asked))[i])

    @torch.no_grad()
    def test_experts_that_all_compute_the_whole_batch(self) -> None:
        model, mux = attached(Dense())
        rows_are_as_alone(mux, lambda: model(noise(3, 2, 8)))
        rows_are_as_alone(mux, lambda: model(noise(3, 2, 4, 8)))

    @torch.no_grad()
    def test_tokens_that_experts_pick(self) -> None:
        """Three of them, by chance as many as there are samples."""
        model, mux = attached(Experts())
        x = torch.zeros(3, 2, 8)
        x[0] = 1
        x[1, 0] = 1
        with mux.route(ROWS), pytest.raises(RoutingError, match="'experts.0'.*picked"):
            model(x)
        with mux.route(["a"] * 3):  # the way out
            got = model(x)
        assert_equal(got, with_adapter(mux, "a", lambda: model(x)))

    @torch.no_grad()
    def test_space_and_time(self) -> None:
        torch.manual_seed(0)
        shared = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        shared |= {"num_attention_heads": 2, "image_size": 16, "num_frames": 4}
        video = noise(3, 4, 3, 16, 16)
        model, mux = attached(T.TimesformerModel(T.TimesformerConfig(**shared, patch_size=8)))
        with mux.route(ROWS), pytest.raises(RoutingError, match="batch of 3 samples"):
            model(video)
        config = T.VivitConfig(**shared, tubelet_size=[2, 8, 8])
        model, mux = attached(T.VivitModel(config))
        rows_are_as_alone(mux, lambda: model(video).last_hidden_state)


class Translator(nn.Module):
    """A decoder of torch's, whose tokens come first."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.layer = nn.TransformerDecoderLayer(32, 2, 48, dropout=0)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).transpose(0, 1)
        return self.layer(x, x).transpose(0, 1)


class Experts(nn.Module):
    """A mixture: tokens of ones go to the first expert, the others to the second."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[..., 0] != 1).long()
        y = torch.empty_like(x)
        for i, expert in enumerate(self.experts):
            y[chosen == i] = expert(x[chosen == i])
        return y


class Dense(nn.Module):
    """A mixture of all experts, as small ones are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        return sum(expert(x) * x.mean(-1, True) for expert in self.experts)  # type: ignore[return-value]
