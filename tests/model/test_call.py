"""mux.call: one call of any function under rows, each row against itself alone."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_mux
from diffusion import diffusers, unet
from lora_mux.errors import ArgumentTypeError, DetachedError, RoutingError, UnknownAdapterError
from tenants import Model, Row, attached, check, tenant, truth


@pytest.fixture
def stage(tmp_path: Any) -> Any:
    model, mux = attached(rank_rows=16)
    tenants = {n: tenant(tmp_path / n, {"first": 4, "second": 4}, i) for i, n in enumerate("ab")}
    for name, made in tenants.items():
        mux.load(name, made.folder)
    return model, mux, tenants, torch.randn(2, 12)


def right(model: Model, x: Tensor, got: Tensor, rows: list[Row]) -> None:
    torch.testing.assert_close(got.detach().double(), truth(model, x, rows), rtol=0, atol=1e-4)


def test_what_the_function_returns(stage: Any) -> None:
    model, mux, tenants, x = stage
    seen: list[Any] = []

    def function(batch: Tensor, *more: int, key: str) -> tuple[Tensor, Any]:
        seen.append((more, key))
        return model(batch), more

    got, more = mux.call(["b", None])(function, x, 1, 2, key="k")
    right(model, x, got, [[(tenants["b"], 1.0)], []])
    assert seen == [((1, 2), "k")] and more == (1, 2)
    check(model, x, [[], []])


def test_a_call_that_is_made_once_and_run_often(stage: Any, tmp_path: Any) -> None:
    """Names mean what they mean when it runs."""
    model, mux, tenants, x = stage
    call = mux.call(["a", None])
    for _ in range(2):
        right(model, x, call(model, x), [[(tenants["a"], 1.0)], []])
    other = tenant(tmp_path / "other", {"first": 4}, 9)
    mux.load("a", other.folder, replace=True)
    right(model, x, call(model, x), [[(other, 1.0)], []])
    mux.remove("a")
    with pytest.raises(UnknownAdapterError):
        call(model, x)
    check(model, x, [[], []])


def test_weights_and_repeated_samples(stage: Any) -> None:
    model, mux, tenants, x = stage
    index = torch.tensor([[mux.adapters["a"]], [mux.adapters["b"]]])
    weights = torch.tensor([[0.5], [-2.0]], requires_grad=True)
    a, b = [(tenants["a"], 0.5)], [(tenants["b"], -2.0)]
    right(model, x, mux.call(index, weights)(model, x), [a, b])
    many = torch.randn(8, 12)
    got = mux.call(index, weights, expand={"interleave": 2, "tile": 2})(model, many)
    right(model, many, got, [a, a, b, b, a, a, b, b])
    got.sum().backward()
    assert weights.grad is not None and bool((weights.grad != 0).all())


def test_nothing_inside_or_outside_wins(stage: Any) -> None:
    model, mux, tenants, x = stage

    def function() -> list[Tensor]:
        got = [model(x)]
        with mux.route([None, "b"]):
            got.append(model(x))
        with mux.disable_adapter():
            got.append(model(x))
        mux.set_adapter("b")
        return [*got, model(x)]

    with mux.route(["b"] * 5):
        for got in mux.call(["a", None])(function):
            right(model, x, got, [[(tenants["a"], 1.0)], []])
    check(model, x, [[(tenants["b"], 1.0)]] * 2)  # what was set inside, from then on


def test_calls_nest(stage: Any) -> None:
    model, mux, tenants, x = stage

    def outer() -> tuple[Tensor, Tensor, Tensor]:
        return model(x), mux.call([None, "b"])(model, x), model(x)

    first, inner, last = mux.call(["a", None])(outer)
    right(model, x, inner, [[], [(tenants["b"], 1.0)]])
    for got in (first, last):
        right(model, x, got, [[(tenants["a"], 1.0)], []])
    # The keyword of the model goes before any call.
    got = mux.call(["a", None])(model, x, adapter_names=[None, "b"])
    right(model, x, got, [[], [(tenants["b"], 1.0)]])


def test_an_exception_leaves_nothing(stage: Any) -> None:
    model, mux, tenants, x = stage

    def fails(kind: type[BaseException]) -> None:
        model(x)
        raise kind

    for kind in (ValueError, KeyboardInterrupt):
        with mux.route(["b", None]):
            with pytest.raises(kind):
                mux.call(["a", None])(fails, kind)
            check(model, x, [[(tenants["b"], 1.0)], []])
    check(model, x, [[], []])
    mux.detach()


def test_threads_each_with_a_call(stage: Any) -> None:
    model, mux, tenants, x = stage
    got: dict[str, list[Tensor]] = {"a": [], "b": []}
    both = threading.Barrier(2)

    def function() -> Tensor:
        both.wait(10)  # both calls are open
        answer: Tensor = model(x)
        both.wait(10)
        return answer

    def run(name: str) -> None:
        got[name] = [mux.call([name, None])(function) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(name,)) for name in got]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, answers in got.items():
        assert len(answers) == 5
        for answer in answers:
            right(model, x, answer, [[(tenants[name], 1.0)], []])


class TestRefusals:
    def test_what_would_run_after_the_call(self, stage: Any) -> None:
        model, mux, _, x = stage
        ran = []

        async def coroutine() -> None:
            ran.append(1)

        def generator() -> Iterator[None]:
            ran.append(2)
            yield

        async def stream() -> AsyncIterator[None]:
            ran.append(3)
            yield

        for function in (coroutine, generator, stream, lambda: generator()):
            with pytest.raises(ArgumentTypeError, match="`function` must have run when it returns"):
                mux.call(["a", None])(function)
        assert not ran
        for lazy in (lambda: map(model, [x]), lambda: filter(None, map(model, [x]))):
            with pytest.raises(ArgumentTypeError, match="got a (map|filter)"):
                mux.call(["a", None])(lazy)
        with ThreadPoolExecutor(1) as pool:
            with pytest.raises(ArgumentTypeError, match="got a Future"):
                mux.call(["a", None])(pool.submit, model, x)
        assert mux.call(["a", None])(list, map(model, [x]))[0].shape == (2, 7)
        check(model, x, [[], []])

    def test_a_future(self, stage: Any) -> None:
        _, mux, _, _ = stage

        async def main() -> None:
            with pytest.raises(ArgumentTypeError, match="got a Future"):
                mux.call(["a", None])(asyncio.get_running_loop().create_future)

        asyncio.run(main())

    def test_rows_at_once(self, stage: Any) -> None:
        _, mux, _, _ = stage
        with pytest.raises(UnknownAdapterError):
            mux.call(["c"])
        with pytest.raises(RoutingError, match="`expand`"):
            mux.call(["a"], expand="twice")

    def test_a_batch_that_does_not_fit(self, stage: Any) -> None:
        model, mux, _, x = stage
        with pytest.raises(RoutingError, match=r"`rows` .*\(2\), got 3"):
            mux.call(["a", None, "b"])(model, x)
        check(model, x, [[], []])

    def test_a_call_of_a_detached_mux(self, stage: Any) -> None:
        model, mux, _, x = stage
        call = mux.call(["a", None])
        mux.detach()
        lora_mux.attach(model)
        with pytest.raises(DetachedError):
            call(model, x)
        with pytest.raises(DetachedError):
            mux.call(["a", None])


def pipeline() -> Any:
    """A pipeline with guidance, of the smallest size, whose text encoder is a table."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet(),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_pipeline_with_guidance_and_several_images() -> None:
    """Its batch is both images of each prompt, then all of them without the prompt."""
    pipe = pipeline()
    mux = lora_mux.attach(pipe.unet, ["to_q", "to_v", "to_out.0"])
    for seed, name in enumerate(("ink", "pixel")):
        torch.manual_seed(seed)
        pairs = {}
        for path in mux.targets:
            layer: Any = pipe.unet.get_submodule(path)
            A, B = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
            pairs[path] = A, B
        mux.add_adapter(name, pairs, scaling=0.3)
    torch.manual_seed(5)
    prompts, latents = torch.randn(2, 7, 32), torch.randn(4, 4, 8, 8)
    none = torch.randn(1, 7, 32)
    how = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"}

    def draw(prompts: Tensor, latents: Tensor, images: int) -> Any:
        return pipe(
            prompt_embeds=prompts,
            negative_prompt_embeds=none.expand(len(prompts), -1, -1),
            latents=latents,
            num_images_per_prompt=images,
            **how,
        ).images

    rows = ["ink", {"ink": 0.5, "pixel": 2.0}]
    got = mux.call(rows, expand={"interleave": 2, "tile": 2})(draw, prompts, latents, 2)
    base = draw(prompts, latents, 2)
    for i in range(4):
        row = rows[i // 2]
        call = mux.call([row], expand={"tile": 2})
        want = call(draw, prompts[i // 2 : i // 2 + 1], latents[i : i + 1], 1)[0]
        # Guidance multiplies what rounding does to a difference of two answers.
        size = float(want.abs().max())
        torch.testing.assert_close(got[i], want, rtol=0, atol=5e-4 * size)
        assert float((got[i] - base[i]).abs().max()) > 0.1 * size
    with pytest.raises(RoutingError, match=r"\(8\), got 2; .*expand"):
        mux.call(rows)(draw, prompts, latents, 2)
    with pytest.raises(RoutingError, match='"tile": 2'):
        mux.call(rows, expand="tile")(draw, prompts, latents, 2)
