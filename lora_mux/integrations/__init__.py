"""lora_mux inside engines that are not ours; nothing here runs unless somebody asks for it.

named_mixes   a folder of adapters, and PEFT folders of their mixes, made by name and kept
vllm          vLLM's plug-in: requests for model="sql+0.4*french"
vllm_kernels  an experiment: lora_mux's operators in vLLM's layers
"""
