"""The Triton kernels of lora_mux: plan, shrink, expand, and their launchers.

Imports torch and triton, and nothing of lora_mux; there only `ops` and `operators` import it,
when they need it.
"""
