"""Loss on held-out records during training: every clip at the same few noise levels, so that the numbers of
two steps, or of two runs, can be compared.
"""

import dataclasses

import jax
import numpy as np

from data import loader, mixture, plan
from launch.common import program, settings
from launch.common.progress import say
from sora_jax import train
from sora_jax.errors import BadInput

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
_measure = jax.jit(train.loss_at_sigma, static_argnames="model")


def check(config):
  """BadInput where config.eval and config.data.held_out do not go together."""
  if config.eval.every < 0:
    raise BadInput(f"config.eval.every is {config.eval.every}; it must be 0 (never) or more")
  if config.eval.every and not config.data.held_out:
    raise BadInput(
      f"config.eval.every is {config.eval.every} and config.data.held_out is empty; give a directory of "
      "records that are not trained on, or set every to 0"
    )


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """Held-out records and the plan of their rows. Calling it measures the loss; all processes call it."""

  config: object
  model: object
  layout: object
  index: object
  rows: plan.Plan
  sigmas: tuple

  @classmethod
  def open(cls, config, model, layout, sigma, trained):
    """From config.data.held_out. BadInput where its records are not of the VAE and the text encoder of those
    that are trained on, `trained`. sigma: SigmaConfig.
    """
    index = mixture.open_all(config.data.held_out)
    for name in ("vae_fingerprint", "text_fingerprint", "latent_channels"):
      theirs, ours = index.header.get(name), trained.header.get(name)
      if theirs != ours:
        raise BadInput(
          f"--config.data.held_out={config.data.held_out}: {name} is {theirs}, of the records trained on "
          f"{ours}; encode the held-out clips with the same --workdir"
        )
    rows = settings.plan_rows(config, index, model, weights=())
    if len(rows.misfits) == len(index):
      raise BadInput(
        f"--config.data.held_out={config.data.held_out}: none of its {len(index)} clips fits in a row; raise "
        "--config.data.row_tokens"
      )
    if rows.misfits:
      say(f"{len(rows.misfits)} of {len(index)} held-out clips fit in no row and are left out")
    within = tuple(value for value in SIGMAS if sigma.low <= value <= sigma.high)
    return cls(config, model, layout, index, rows, within or ((sigma.low + sigma.high) / 2,))

  def __call__(self, frozen, step, state):
    """{"held_out_loss": mean over the noise levels, "held_out_loss_at_0.1": ...} of the running mean of the
    weights.
    """
    del step
    params = {**(frozen or {}), **(state.ema or state.params)}
    key, sums = jax.random.key(self.config.seed), np.zeros((len(self.sigmas), 2))
    for batch in self.batches():
      sums += [
        [float(value) for value in _measure(params, batch, key, np.float32(sigma), model=self.model)]
        for sigma in self.sigmas
      ]
    losses = sums[:, 0] / np.maximum(sums[:, 1], 1)
    by_sigma = zip(self.sigmas, losses.tolist(), strict=True)
    return {"held_out_loss": float(losses.mean())} | {
      f"held_out_loss_at_{sigma:g}": loss for sigma, loss in by_sigma
    }

  def batches(self):
    """Yields each held-out clip once, in batches on the devices, with its text and nothing given."""
    data, dit = self.config.data, self.model.dit
    part, parts_count = train.part_of_rows(self.layout, data.rows)
    stream = loader.batches(
      self.index,
      self.rows,
      seed=self.config.seed,
      host=part,
      hosts=parts_count,
      embedded=self.model.text is None,
      caption_dropout=0.0,
      base_fps=data.base_fps or None,
      cond_channels=dit.cond_channels,
      max_damaged=data.max_damaged,
      on_damage=program.warn,
      epochs=1,
      threads=data.threads,
    )
    for batch, _ in stream:
      yield train.place_batch(batch, self.layout, part, parts_count)
