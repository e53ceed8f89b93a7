"""SmolVLM2: as Idefics3. (The first SmolVLM calls itself idefics3.)"""

from typing import ClassVar

from transformers import SmolVLMForConditionalGeneration, SmolVLMProcessor
from transformers.models.smolvlm import processing_smolvlm

from gridprune_cli.vlm.idefics3 import Idefics3

# transformers builds this processor only where num2words is installed, which spells how many frames a video has
processing_smolvlm.num2words = processing_smolvlm.num2words or str


class SmolVLM(Idefics3):
    model_class: ClassVar = SmolVLMForConditionalGeneration
    processor_class: ClassVar = SmolVLMProcessor
