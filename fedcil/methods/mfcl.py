"""MFCL (Babakniya et al., arXiv 2311.07784; workshop version 2307.00497): data-free generative replay.

At the end of each task the server trains a generator from the global model alone. In later tasks clients mix
its images into their batches. They store nothing, so anyone may join or leave at any time.

A step for task t with q old and V seen classes, real images x, synthetic ones x~ with labels y~ = argmax of
the frozen teacher (F', W', b'), X = (x, x~), f = F(X):

    L = w_ce CE(new rows of the head on f of x, y)            gradient to F and the new rows
      + w_ft CE(head on stop-gradient(f), (y, y~))            gradient to the head only
      + w_kd mean(((f - f') W'^T)^2)                          gradient to F only

with one student pass and one teacher pass over X.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from fedcil.capture import repeatable
from fedcil.compute import Compute
from fedcil.errors import ScenarioError
from fedcil.keys import Key
from fedcil.messages import Payload
from fedcil.methods.adam import Adam
from fedcil.methods.base import Batch, Boundary, Draws, Method, Notice, Prepared, Progress, part, prefixed
from fedcil.methods.inversion import Weights, generator_loss, running_norms
from fedcil.methods.replay import Replay, draw_pool, drawn
from fedcil.methods.settings import ExtraImages, MethodSettings
from fedcil.models import Architecture
from fedcil.models.generator import Generator, default_upsamplings
from fedcil.models.network import Network, allocate, freeze, initialise, load_state, snapshot, state_of
from fedcil.section import Above0, Count, NonNegative, Positive
from fedcil.state import ServerState
from fedcil.stream import Task
from fedcil.tensors import Tensors, count_bytes

COVERAGE_IMAGES = 4096  # drawn at a boundary to see which classes the generator makes


class MFCL(MethodSettings):
    name: Literal["mfcl"] = "mfcl"
    # Client.
    synthetic: Positive | None = Field(None, description="synthetic images of a step, whatever the real batch")
    synthetic_ratio: Annotated[float, Field(gt=0.0, le=1e6)] | None = Field(
        None, description="instead of synthetic: images per old class for each real one per new class"
    )
    pool: Count = Field(0, description="images drawn once a task; 0: fresh latents at every step")
    bn_updates: Literal[1, 2] = Field(
        1, description="updates of the running statistics in a step; the authors' second pass makes it 2"
    )
    w_ce: NonNegative = Field(1.0, description="weight of the cross-entropy over new classes, for the backbone")
    w_ft: NonNegative = Field(1.0, description="weight of the cross-entropy over all classes, for the head")
    w_kd: NonNegative = Field(0.1, description="weight of the distillation through the old head")
    # Generator.
    latent: Annotated[int, Field(ge=1, le=10**6)] = Field(1000, description="numbers of a latent vector")
    generator_width: Annotated[int, Field(ge=2, le=65536)] = Field(
        128, description="channels; the last block has half of them"
    )
    upsamplings: Count | None = Field(
        None,
        description="doublings from the first map to the image; default: 2, or as many as begin with 8 pixels at most",
    )
    steps: Count = Field(100, description="generator steps at a boundary")
    generator_batch: Annotated[int, Field(ge=1, le=10**6)] = Field(128, description="latents of a step")
    generator_lr: Above0 = Field(1e-3, description="Adam's learning rate")
    continue_generator: bool = Field(True, description="go on with the last boundary's generator, not with a new one")
    temperature: Above0 = Field(1000.0, description="tau, which divides the logits of the label term")
    entropy: Literal["normalised", "plain"] = Field(
        "normalised", description="over ln K and from 0, as released; or plain, the paper's formula"
    )
    w_label: NonNegative = Field(1.0, description="weight of the label term")
    w_ie: NonNegative = Field(1.0, description="weight of the information entropy")
    w_bn: NonNegative = Field(50.0, description="weight of the divergence from batch norm's running statistics")
    w_prior: NonNegative = Field(1e-3, description="weight of the smoothness of images")
    w_act: NonNegative = Field(0.0, description="weight of the activation term")

    either_or: ClassVar = (frozenset({"synthetic", "synthetic_ratio"}),)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # The paper's formulas for temperature, entropy and updates; latent, steps and w_bn are not confirmed from its
        # text; all else is the released code's.
        "paper": {
            "synthetic": 128,
            "latent": 200,
            "steps": 5000,
            "temperature": 1.0,
            "entropy": "plain",
            "w_bn": 75.0,
        },
        # The released program: two updates of the running statistics per step, tau = 1000.
        "authors-code": {"synthetic": 128, "bn_updates": 2},
        # Small images and few samples on a CPU.
        "small": {
            "synthetic_ratio": 1.0,
            "pool": 4096,
            "w_kd": 0.3,
            "latent": 64,
            "generator_width": 32,
            "steps": 200,
            "generator_batch": 64,
            "generator_lr": 5e-3,
            "temperature": 1.0,
            "w_ie": 10.0,
            "w_bn": 10.0,
        },
    }

    @model_validator(mode="after")
    def _number_or_ratio(self) -> Self:
        if (self.synthetic is None) == (self.synthetic_ratio is None):
            raise ValueError("give one of method.synthetic (a number) and method.synthetic_ratio, or a preset")
        return self

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if self.w_ce + self.w_ft + self.w_kd == 0:
            raise ValueError("method.w_ce, w_ft and w_kd are all 0: clients would learn nothing")
        if self.w_label + self.w_ie + self.w_bn + self.w_prior + self.w_act == 0:
            raise ValueError("all weights of the generator's loss are 0: it would learn nothing")
        return self

    def check_model(self, architecture: Architecture) -> None:
        """The generator makes square images whose side it can reach by doubling, and its norm term looks at the
        classifier's batch norms.
        """
        _, height, width = architecture.image
        ups = default_upsamplings(height) if self.upsamplings is None else self.upsamplings
        if height != width or height % (1 << ups):
            raise ScenarioError(
                f"the generator cannot make images of {height} x {width} pixels with {ups} up-samplings",
                where="method.upsamplings",
                allowed=f"square images whose side is a multiple of 2^{ups}",
                next="set data.image_size, or method.upsamplings",
            )
        if self.steps and height >> ups == 1 and self.generator_batch < 2:
            raise ScenarioError(
                "the generator's first maps have one pixel, and its batch norm needs more than one of them",
                where="method.generator_batch",
                allowed="at least 2",
                next="set method.generator_batch, or lower method.upsamplings",
            )
        if self.steps and self.w_bn and not running_norms(architecture.build(1)):
            raise ScenarioError(
                "the model has no batch norm with running statistics for the generator's norm term to hold on to",
                where="method.w_bn",
                allowed="0 with this model",
                next="set method.w_bn = 0, or choose a model with batch norm",
            )

    def payload_bytes(self, model: Tensors, compute: Compute) -> int:
        return count_bytes(model) + count_bytes(state_of(self._generator_without_memory(compute)))

    def build(self) -> Method:
        return Method(
            takes_old_labels=False,
            prepare=self._prepare,
            draw=self._draw,
            loss=self._loss,
            norm_updates=lambda task: self.bn_updates if task.old else 1,
            boundary=self._boundary,
        )

    def synthetic_images(self, real: int, task: Task) -> int:
        """S: how many synthetic images join a batch of ``real`` real ones."""
        if self.synthetic is not None:
            return self.synthetic
        assert self.synthetic_ratio is not None
        return max(1, round(self.synthetic_ratio * real * task.old / len(task.classes)))

    def extra_images(self, real: int, task: Task) -> ExtraImages:
        return ExtraImages(self.pool, self.synthetic_images(real, task), 2 * self.generator_batch)

    def make_generator(self, compute: Compute) -> Generator:
        """On the CPU, in uninitialised memory."""
        return allocate(self._generator_without_memory(compute))

    def _generator_without_memory(self, compute: Compute) -> Generator:
        channels, size, _ = compute.architecture.image
        with torch.device("meta"):
            return Generator(
                channels=channels,
                size=size,
                latent=self.latent,
                width=self.generator_width,
                upsamplings=self.upsamplings,
                precision=compute.autocast,
            )

    def place(self, generator: Generator, compute: Compute) -> Generator:
        return generator.to(compute.device).to(memory_format=torch.channels_last)

    def _prepare(self, compute: Compute, task: Task, payload: Payload | None, key: Key) -> Prepared:
        if payload is None:
            return None
        teacher = compute.teacher(part("teacher", payload.tensors))
        generator = self.place(self.make_generator(compute), compute)
        load_state(generator, part("generator", payload.tensors))
        freeze(generator)
        compute.settle(generator)
        pool = draw_pool(generator, teacher, self.pool, key.at("pool")) if self.pool else None
        return Replay(teacher, generator, pool)

    def _draw(self, replay: Prepared, real: int, task: Task, key: Key) -> Draws:
        """Places in the pool (S,) on the CPU, or latents (S, latent) on the device."""
        if replay is None:
            return None
        count = self.synthetic_images(real, task)
        if replay.pool is not None:
            return torch.randint(len(replay.pool.images), (count,), generator=key.torch())
        device = replay.teacher.head.weight.device
        return torch.randn(count, self.latent, generator=key.torch(device), device=device)

    def _loss(self, model: Network, replay: Prepared, batch: Batch, draws: Draws) -> Tensor:
        if replay is None:  # the first task has nothing to replay
            return F.cross_entropy(model(batch.images), batch.labels)
        both, past = replay.mix(batch.images, draws)
        real = len(batch.images)
        labels = torch.cat([batch.labels, past[real:].argmax(1)])
        features = model.features(both)
        terms: tuple[tuple[float, Callable[[], Tensor]], ...] = (
            (self.w_ce, lambda: new_class_loss(model, features[:real], batch.labels, batch.task)),
            (self.w_ft, lambda: F.cross_entropy(model.head(features.detach()), labels)),
            (self.w_kd, lambda: F.mse_loss(replay.teacher.head(features), past)),
        )
        return sum((w * term() for w, term in terms if w > 0), start=torch.zeros_like(features[0, 0]))

    def _boundary(self, state: ServerState, task: Task, key: Key, compute: Compute, progress: Progress) -> Boundary:
        classifier = compute.frozen(state.model)
        generator = self.make_generator(compute)
        if self.continue_generator and state.payload is not None:
            load_state(generator, part("generator", state.payload.tensors))
        else:
            initialise(generator, key.at("generator").torch())  # on the CPU: the same for every device
        generator = self.place(generator, compute)
        terms = self._train_generator(generator, classifier, key, progress)
        generator.eval()
        histogram = coverage(generator, classifier, key.at("coverage"))
        tensors = prefixed("teacher", state.model) | prefixed("generator", snapshot(generator))
        return Boundary(
            replace(state, payload=Payload.of(tensors)),
            log={"generator": terms, "histogram": histogram},  # by label, in the order of the stream
            warnings=vanished_classes(histogram),
        )

    def _train_generator(
        self, generator: Generator, classifier: Network, key: Key, progress: Progress
    ) -> dict[str, list[float]]:
        """Adam on the generator alone; returns each term at every tenth part of the steps and at the last."""
        device, start = classifier.head.weight.device, snapshot(generator)
        optimizer, weights = Adam(generator.train().parameters(), self.generator_lr), self.loss_weights()
        latents, terms = torch.zeros(self.generator_batch, self.latent, device=device), dict[str, Tensor]()

        def update() -> None:
            loss, found = generator_loss(classifier, generator(latents), weights)
            optimizer.step(loss)
            terms.update(found)

        advance = repeatable(update, device) if self.steps else update
        load_state(generator, start)
        optimizer.reset()
        log: dict[str, list[float]] = {}
        every = max(1, self.steps // 10)
        for step in range(self.steps):
            latents.normal_(generator=key.at("latents", step).torch(device))
            advance()
            told = step % every == 0 or step == self.steps - 1
            shown = {name: float(value.detach()) for name, value in terms.items()} if told else {}
            for name, value in shown.items():
                log.setdefault(name, []).append(value)
            progress(step + 1, self.steps, shown)
        return log

    def loss_weights(self) -> Weights:
        return Weights(
            label=self.w_label,
            entropy=self.w_ie,
            norm=self.w_bn,
            prior=self.w_prior,
            activation=self.w_act,
            temperature=self.temperature,
            normalised_entropy=self.entropy == "normalised",
        )


def new_class_loss(model: Network, features: Tensor, labels: Tensor, task: Task) -> Tensor:
    """L_CE over the head's new rows: features (b, d), labels (b,) in [old, seen)."""
    head = model.head
    rows = slice(task.old, task.seen)
    return F.cross_entropy(F.linear(features, head.weight[rows], head.bias[rows]), labels - task.old)


def coverage(generator: Generator, classifier: Network, key: Key) -> list[int]:
    """How many of ``COVERAGE_IMAGES`` generated images the classifier puts into each class."""
    found = torch.cat([past.argmax(1) for _, _, past in drawn(generator, classifier, COVERAGE_IMAGES, key)])
    return torch.bincount(found, minlength=classifier.head.out_features).tolist()


def vanished_classes(histogram: list[int]) -> tuple[Notice, ...]:
    """A warning for classes with less than a fifth of their share: they will be forgotten."""
    floor = sum(histogram) / (5 * len(histogram))
    missing = [label for label, count in enumerate(histogram) if count < floor]
    if not missing:
        return ()
    text = (
        "the generator hardly makes {classes} (less than 1/5 of their share): raise method.w_ie, "
        "then training.rounds or method.steps; their accuracy will suffer from the next task on"
    )
    return (Notice(text, tuple(missing)),)
