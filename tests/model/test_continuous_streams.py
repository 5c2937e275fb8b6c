"""transformers' continuous batching on a stream of its own, as on a GPU: nothing may race."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from continuous import batching, collected, crowded

from cuda_streams import CUDA, Notes, Stream, cuda_streams
from peft_oracle import attached_llama, transformers

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:FutureWarning")

continuous_api, model_runner = (
    pytest.importorskip(f"transformers.generation.continuous_batching.{name}")
    for name in ("continuous_api", "model_runner")  # the second not in all that we support
)
Manager = continuous_api.ContinuousBatchingManager


def test_adapters_that_take_turns_in_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, compute = attached_llama(tmp_path / "peft").base, Stream(name="compute")
    loop, create = Manager._run_generation_loop, Manager._create_batch_processor

    def noted_loop(self: Any, **how: bool) -> None:
        with Notes():  # which counts for one thread
            loop(self, **how)

    def on_a_stream(self: Any) -> Any:
        processor = create(self)
        processor.inputs_and_outputs.compute_stream = compute
        return processor

    monkeypatch.setattr(Manager, "_run_generation_loop", noted_loop)
    monkeypatch.setattr(Manager, "_create_batch_processor", on_a_stream)
    for module in (continuous_api, model_runner):
        if hasattr(module, "stream_context"):  # transformers 5.15 calls torch.cuda.stream
            monkeypatch.setattr(
                module, "stream_context", lambda s: nullcontext() if s is None else CUDA.stream(s)
            )
    generation = transformers.GenerationConfig(
        max_new_tokens=3, do_sample=False, eos_token_id=255, pad_token_id=0
    )
    with cuda_streams():
        mux = crowded(base, tmp_path / "adapters")
        with mux.model.continuous_batching_context_manager(
            generation_config=generation,
            continuous_batching_config=batching(max_requests_per_batch=1),
        ) as manager:
            for row in ("plain", None, "rslora", "plain", "biased"):
                manager.add_request([5, 17, 99], adapter_names=[row or "__base__"])
            collected(manager, 5)
    assert compute.waits
