"""The Triton kernels of lora_mux: plan, shrink, expand. None is here yet.

This package imports torch and triton, and nothing of lora_mux; only `lora_mux.ops` imports it.
"""
