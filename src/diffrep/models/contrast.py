"""Contrastive representation distillation with a memory of all images (CRD).

Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020.
Letters: B images of a batch, N of the training set, m negatives, D width of the embedding.

Deviations from the official `CRDImageClassifier`, which cannot run: embeddings are registered and so trained, moved
and saved; the memories are buffers on the module's device; whoever calls it says which images it shows; temperature
0.07 is CRD's own, not 0.7. The memory changes once per step, and the normaliser is that of the first whole batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffrep.losses import unit, wide
from diffrep.randomness import Rows


def contrast_table(index: Tensor, num_negatives: int, num_images: int, rng: Rows) -> Tensor:
    """Which memory rows each image is compared with, (B, 1 + m) int64: itself, then uniform draws of all N.

    Args:
        index: (B,) int64, the images' positions in their source.
        num_negatives: m. num_images: N.
        rng: the draws of this step for these rows.
    """
    drawn = (rng.uniform(num_negatives) * num_images).long()  # (B, m)
    return torch.cat([index[:, None], drawn.to(index.device)], 1)


class ContrastiveMemory(nn.Module):
    """(student (B, C), teacher (B, C'), table (B, 1 + m)) -> per image, (B,), least where each finds its partner.

    Its parameters are trained with the student's, and ``after_step`` must follow every update. All processes remember
    what any of them has shown; their shares of a batch are of one length.
    """

    memory_s: Tensor  # (N, D) running unit embeddings of all images, by the student
    memory_t: Tensor
    z_s: Tensor  # () the scores' normaliser, from the first batch; 0 before it
    z_t: Tensor

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        num_images: int,
        width: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,  # share of the old row that stays
    ) -> None:
        super().__init__()
        self.temperature, self.momentum = temperature, momentum
        self.embed_s, self.embed_t = nn.Linear(student_width, width), nn.Linear(teacher_width, width)
        bound = math.sqrt(3 / width)  # rows of length about one
        for side in ("s", "t"):
            self.register_buffer(f"memory_{side}", torch.empty(num_images, width).uniform_(-bound, bound))
            self.register_buffer(f"z_{side}", torch.zeros(()))
        self.shown: list[tuple[Tensor, Tensor, Tensor]] = []  # index, embeddings of each micro-batch of this step

    def forward(self, student: Tensor, teacher: Tensor, table: Tensor) -> Tensor:
        with torch.autocast(student.device.type, enabled=False):
            v_s = unit(self.embed_s(wide(student)), 1)  # (B, D)
            v_t = unit(self.embed_t(wide(teacher)), 1)
            scores_s = self._scores(v_s, self.memory_t, table)  # (B, 1 + m)
            scores_t = self._scores(v_t, self.memory_s, table)
        if self.training:
            self.shown.append((table[:, 0], v_s.detach(), v_t.detach()))
        p_s, p_t = scores_s / self._normaliser(self.z_s, scores_s), scores_t / self._normaliser(self.z_t, scores_t)
        return nce(p_s, len(self.memory_s)) + nce(p_t, len(self.memory_s))

    def _scores(self, v: Tensor, memory: Tensor, table: Tensor) -> Tensor:
        """exp(M[table] . v / temperature). All N products take less room than 1 + m gathered rows per image."""
        return (v @ memory.T / self.temperature).gather(1, table).exp()

    def _normaliser(self, z: Tensor, scores: Tensor) -> Tensor:
        """``z``; before it is known the mean score of this batch times N, which training keeps for good."""
        mean = from_all_processes(scores.detach().mean()[None]).mean()
        found = torch.where(z > 0, z, mean * len(self.memory_s))  # no branch: a GPU need not wait
        if self.training:
            z.copy_(found)
        return found

    @torch.no_grad()
    def after_step(self) -> None:
        """The rows of the images shown move towards what they were embedded as."""
        for shown in self.shown:
            index, v_s, v_t = (from_all_processes(x) for x in shown)
            for memory, v in ((self.memory_s, v_s), (self.memory_t, v_t)):
                memory[index] = unit(self.momentum * memory[index] + (1 - self.momentum) * v, 1)
        self.shown = []


def from_all_processes(x: Tensor) -> Tensor:
    """(B, ...) -> (B of all, ...), by rank; itself where there is one process.

    A loss of the whole batch that every process computes gets the gradients of all: their mean is that of one alone.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x.contiguous()))


def nce(p: Tensor, num_images: int) -> Tensor:
    """Per image: -log(p_0 / (p_0 + m/N)) - sum_k log((m/N) / (p_k + m/N)), (B,).

    Args:
        p: (B, 1 + m) how probable each candidate is; column 0 is the partner.
        num_images: N; noise draws each image with probability 1/N.

    Source: Tian et al. 2020, the critic h = p / (p + m/N) and its log-likelihood; 1e-7 as in the official code.
    """
    noise = (p.shape[1] - 1) / num_images
    right = (p[:, 0] / (p[:, 0] + noise + 1e-7)).log()
    wrong = (noise / (p[:, 1:] + noise + 1e-7)).log().sum(1)
    return -(right + wrong)
