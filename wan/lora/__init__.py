"""LoRA: reading files, merging them, training and extracting one.

from wan.lora import LoRAMerge, merge_lora, read_lora
"""

from wan.lora.merge import LoRA, LoRAMerge, MergeReport, merge_lora, read_lora

__all__ = ["LoRA", "LoRAMerge", "MergeReport", "merge_lora", "read_lora"]
