"""One line of this room, broken: each must turn one of the named tests red."""

from mutation import Mutation

TIMING = "measure/timing.py"
TEST_PLAYED = ("bench/test_on_a_played_gpu.py",)
MUTATIONS = {
    "timing: the clock is read before the GPU is done": Mutation(
        TIMING, "torch.cuda.synchronize(device)", "pass", TEST_PLAYED
    ),
    "timing: the capture does not wait for the buffers": Mutation(
        TIMING, "stream.wait_stream(torch.cuda.current_stream())", "pass", TEST_PLAYED
    ),
}
