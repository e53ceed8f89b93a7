"""The fourth stage: the module of CoViPAL (arXiv 2508.17243), by attention first, then by the model's answers."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from gridprune_cli.scenes.questions import Question, questions
from gridprune_cli.vlm.parts import view_first_layers
from gridprune_cli.vlm.pruning_module import PruningModule
from training import model as built
from training.data import Pool
from training.language import answer_loss, pack
from training.plan import N, Plan

GUIDE = 4  # the layer whose attention is learned, of 6: `--ilp 0.05 --ilp-layer 5`, which goes by it, loses nothing
QUESTIONS = 8  # behind one image, in the first pass
CANDIDATES = 64  # visual tokens that the frozen model sees in the second pass, those of the highest score
SOFTNESS = 0.5  # of the threshold between what is kept and what is not, in units of the score


class Guided(nn.Module):
    """The first pass: the scores' softmax is drawn to the attention of a deeper layer, from all visual tokens.

    Attention is that of a prompt's last token and of the answer's first, added up over both and the heads.
    """

    def __init__(self, llava: LlavaForConditionalGeneration, module: PruningModule) -> None:
        super().__init__()
        llava.requires_grad_(False)
        llava.model.language_model.set_attn_implementation("scenes_probe")
        self.module = module
        self.frozen = (llava, view_first_layers(llava, "model.language_model", GUIDE + 1))  # kept out of state_dict
        self.tokenizer = built.make_tokenizer(close=False)
        self.features = np.empty((0, N, built.WIDTH), np.float16)  # vision features of the scenes, (scenes, N, D)

    def image_embeds(self, index: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Vision features and image embeds of scenes, `(B, N, D)` each."""
        vision_features = torch.from_numpy(self.features[index]).float().to(device)
        return vision_features, self.frozen[0].model.multi_modal_projector(vision_features)

    def scores(self, image_embeds: Tensor, groups: list[list[Question]]) -> Tensor:
        """What the module makes of Q questions about each image `(B, N, D)`: `(B * Q, N)`."""
        texts = [question.text for group in groups for question in group]
        tokens = self.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        embed = self.frozen[0].get_input_embeddings()
        device = image_embeds.device
        per_question = image_embeds.repeat_interleave(len(groups[0]), 0)
        return self.module(per_question, embed(tokens.input_ids.to(device)), tokens.attention_mask.bool().to(device))

    def losses(self, pool: Pool, step: int, plan: Plan, device: torch.device) -> dict[str, Tensor]:
        # 1. several questions behind each scene
        rng = random.Random(f"pruner-{plan.first_seed}-{step}")
        index = pool.batch(step, plan)
        groups = [questions(pool.scene(int(i)), QUESTIONS, rng) for i in index]
        owners = torch.from_numpy(pool.owners[index]).long()
        packed = pack(groups, torch.arange(N).expand(len(index), N), owners, self.tokenizer, rng, closely=True)
        # 2. where the deeper layer looks
        with torch.no_grad():
            vision_features, image_embeds = self.image_embeds(index, device)
            guide = self.frozen[1].model.language_model.layers[GUIDE].self_attn
            guide.probed = packed.probed.to(device)
            answer_loss(self.frozen[1], vision_features, packed)  # for what is probed on the way
            first = int((packed.ids[0] == built.IMAGE).int().argmax())
            attention = guide.attention_weights[..., first : first + N].float().sum(1)  # (B, 2 Q, N), over heads
            guide.probed = guide.attention_weights = guide.head_outputs = None
            attention = attention.unflatten(1, (2, QUESTIONS)).sum(1).flatten(0, 1)  # (B * Q, N)
            target = attention / attention.sum(-1, keepdim=True)
        # 3. how far the scores are from it
        log_share = self.scores(image_embeds, groups).float().log_softmax(-1)
        return {"attention": F.kl_div(log_share, target, reduction="batchmean")}


class Retained(Guided):
    """The second pass: the loss of the frozen model's answers, which sees each token as much as its score is worth.

    A token is retained by sigmoid((score - threshold) / SOFTNESS), the threshold between the K-th and the next score,
    and the logarithm of that is added to all attention to it. Those far below are left out, which says the same.
    """

    def losses(self, pool: Pool, step: int, plan: Plan, device: torch.device) -> dict[str, Tensor]:
        # 1. one question about each scene, since each has tokens of its own
        rng = random.Random(f"pruner-again-{plan.first_seed}-{step}")
        index = pool.batch(step, plan)
        groups = [questions(pool.scene(int(i)), 1, rng) for i in index]
        with torch.no_grad():
            vision_features, image_embeds = self.image_embeds(index, device)
        # 2. how much of each token the model sees
        scores = self.scores(image_embeds, groups).float()  # (B, N)
        k = plan.tokens_at(step)
        highest = scores.detach().topk(CANDIDATES, dim=1)
        threshold = highest.values[:, k - 1 : k + 1].mean(1, keepdim=True)
        chosen = highest.indices.sort(1).values  # (B, n)
        retained = F.logsigmoid((scores.gather(1, chosen) - threshold) / SOFTNESS)
        # 3. the answers' loss
        owners = torch.from_numpy(pool.owners[index]).long()
        packed = pack(groups, chosen.cpu(), owners, self.tokenizer, rng)
        features = vision_features.gather(1, chosen[..., None].expand(-1, -1, vision_features.shape[-1]))
        return {"answer": answer_loss(self.frozen[0], features, packed, retained)}
