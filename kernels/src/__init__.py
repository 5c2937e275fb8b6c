"""The Triton kernels of lora_mux (plan, shrink, expand, fused, weight_gradient), and launchers.

This folder imports torch and triton, and nothing else of lora_mux. lora_mux imports `tensors`
anywhere, since it needs neither, and the rest only where kernels run.
"""
