"""Training the text-to-video model: what a step is.

A batch of packed clips, a noise level for each clip, noise for each token; the model sees data mixed with
noise and says which way the noise lies; the loss is its squared error over all tokens that are not given.
Equations: diffusion/flow.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from sora_jax import batch as batches, layout as layouts, multihost, optim
from sora_jax.diffusion import flow

# xxHash's, one an axis: what stands elsewhere counts differently
PRIMES = (2654435761, 2246822519, 3266489917)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
  """All that training carries from step to step.

  `bad` counts updates that were not finite and were left out.
  """

  step: jax.Array
  params: dict
  ema: dict
  opt: tuple
  bad: jax.Array


def boxed_weights(model):
  """Shapes of the weights with their logical axes."""
  return jax.eval_shape(model.init, jax.random.key(0))


def abstract_state(model, tx):
  """State of ShapeDtypeStructs with their shardings: what a checkpoint is restored into, and what
  `init_state` returns.
  """
  params, opt = optim.abstract(tx, boxed_weights(model), model.layout)
  sharding = None if model.layout is None else model.layout.fitted(())
  scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding)
  return State(scalar, params, params, opt, scalar)


def state_of(params, model, tx):
  """A State that begins with these weights, which it takes (they are donated)."""
  make = functools.partial(_first_state, tx=tx)
  return jax.jit(make, out_shardings=shardings(model, tx), donate_argnums=0)(params)


def init_state(model, tx, key):
  """A new State; every weight is made where it lives."""

  def make(key):
    return _first_state(layouts.unbox(model.init(key)), tx)

  return jax.jit(make, out_shardings=shardings(model, tx))(key)


def _first_state(params, tx):
  """The State before the first update: the running mean begins with the weights."""
  zero = jnp.zeros((), jnp.int32)
  return State(zero, params, jax.tree.map(jnp.copy, params), tx.init(params), jnp.copy(zero))


def shardings(model, tx):
  """Where the leaves of a State live; None without a layout."""
  return None if model.layout is None else jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, tx))


def noised(batch, key, sigma):
  """A batch and a key -> (x_BLP, noise_BLP, sigma_BU, sigma_index_BL, sigma_BG): each clip at its own noise
  level.
  """
  keys_BG = flow.clip_keys(key, batch.uid_BG2, batch.epoch_BG)
  clips = batch.uid_BG2.shape[1]
  tokens_BG = jax.vmap(functools.partial(jnp.bincount, length=clips + 1))(batch.segment_BL)[:, 1:]
  sigma_BG = flow.draw_sigma(keys_BG, tokens_BG, sigma)
  return mixed(batch, keys_BG, sigma_BG) + (sigma_BG,)


def mixed(batch, keys_BG, sigma_BG):
  """The batch at given noise levels: (x_BLP, noise_BLP, sigma_BU, sigma_index_BL)."""
  noise_BLP = flow.token_noise(keys_BG, batch.segment_BL, batch.coords_BL3, batch.tokens_BLP.shape[-1])
  sigma_BU, sigma_index_BL = flow.token_sigma(sigma_BG, batch.segment_BL, batch.given_BL)
  x_BLP = flow.interpolate(batch.tokens_BLP, noise_BLP, flow.gather_sigma(sigma_BU, sigma_index_BL))
  return x_BLP, noise_BLP, sigma_BU, sigma_index_BL


def loss_fn(params, model, batch, key, sigma, frozen=None):
  """Mean squared error of the velocity over all not-given tokens of the global batch. -> scalar

  frozen: weights beside `params`, by key, which no gradient is taken of (those that adapters adapt).
  """
  params = {**(frozen or {}), **params}
  x_BLP, noise_BLP, sigma_BU, sigma_index_BL, _ = noised(batch, key, sigma)
  text_BSE = model.embed_text(params, batch)
  predicted = model.velocity(params, x_BLP, batch, sigma_BU, sigma_index_BL, text_BSE)
  total, count = flow.velocity_loss(predicted, batch.tokens_BLP, noise_BLP, batch.segment_BL, batch.given_BL)
  return total / jnp.maximum(count, 1)


def train_step(state, batch, key, frozen=None, *, model, tx, ema_decay, sigma):
  """One update. (State, PackedBatch, key of the run) -> (State, metrics); same inputs, same outputs.

  The noise of a clip depends on the key, its uid and its epoch, so a resumed run replays it. An update whose
  loss or gradient is not finite leaves params, ema and opt as they were; `step` goes on, `bad` counts it,
  metrics["bad"] is 1.
  """
  loss, grads = jax.value_and_grad(loss_fn)(state.params, model, batch, key, sigma, frozen)
  grad_norm = optax.tree.norm(grads)
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  updates, opt = tx.update(grads, state.opt, state.params)
  params = optax.apply_updates(state.params, updates)
  ema = optim.ema_update(state.ema, params, state.step, ema_decay)
  params, ema, opt = optim.keep_if_finite(finite, (params, ema, opt), (state.params, state.ema, state.opt))
  bad = 1 - finite.astype(jnp.int32)
  metrics = {
    "loss": loss,
    "grad_norm": grad_norm,
    "bad": bad,
    "tokens": jnp.sum(batch.segment_BL > 0),
    "data_checksum": checksum(batch),
  }
  return State(state.step + 1, params, ema, opt, state.bad + bad), metrics


def jit_step(model, tx, *, ema_decay, sigma):
  """The compiled update, (State, PackedBatch, key, frozen=None) -> (State, metrics), see `train_step`. It
  donates the State.

  What launch.train runs and what a check beforehand compiles: `jit_step(...).lower(abstract_state(...),
  batch_shapes(...), key)`.
  """
  step = functools.partial(train_step, model=model, tx=tx, ema_decay=ema_decay, sigma=sigma)
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings(model, tx), None))


def loss_at_sigma(params, batch, key, value, *, model):
  """Held-out loss with every clip at one noise level: (sum over tokens, tokens that count)."""
  keys_BG = flow.clip_keys(key, batch.uid_BG2, batch.epoch_BG)
  sigma_BG = jnp.full(batch.fps_BG.shape, value, jnp.float32)
  x_BLP, noise_BLP, sigma_BU, sigma_index_BL = mixed(batch, keys_BG, sigma_BG)
  predicted = model.velocity(params, x_BLP, batch, sigma_BU, sigma_index_BL, model.embed_text(params, batch))
  return flow.velocity_loss(predicted, batch.tokens_BLP, noise_BLP, batch.segment_BL, batch.given_BL)


def checksum(batch):
  """A number of 32 bits that tells a batch from others: of the tokens, segments and texts of all its rows, in
  integers, so that it does not depend on how the batch is cut over devices."""
  total = jnp.uint32(0)
  for value in (batch.tokens_BLP, batch.segment_BL, batch.text_BS, batch.text_BSE):
    if value is not None:
      bits = jax.lax.bitcast_convert_type(value.astype(jnp.float32), jnp.uint32)
      position = jnp.uint32(0)
      for axis in range(bits.ndim):
        position += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(PRIMES[axis])
      total += jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)
  return total


def part_of_rows(layout, rows):
  """Which rows of a step this process must load, as (part, parts): the part-th of so many equal ones.
  Processes that hold other tokens or heads of the same rows load the same."""
  held = layout.fitted((rows,), "act_batch").addressable_devices_indices_map((rows,)).values()
  first, last = (pick(index[0].indices(rows)[end] for index in held) for pick, end in ((min, 0), (max, 1)))
  count = last - first
  return (first // count, rows // count) if rows % count == first % count == 0 else (0, 1)


BATCH_AXES = {"BL": ("act_batch", "act_length"), "BS": ("act_batch", "act_text"), "BG": ("act_batch", None)}


def batch_sharding(name, shape, layout):
  """Where an array of a PackedBatch lives: rows are cut over the mesh's data and fsdp axes, tokens over its
  context axis.
  """
  letters = name.rsplit("_", 1)[1]
  return layout.fitted(shape, *BATCH_AXES[letters[:2]])


def batch_shapes(model, rows, shape):
  """PackedBatch of ShapeDtypeStructs, with shardings: what `place_batch` makes of `rows` rows of a RowShape
  for this model.
  """
  cfg = model.dit
  specs = batches.array_specs(
    rows, shape, cfg.values_in, None if model.text else cfg.text_width, cfg.values_cond
  )

  def struct(name, dims, dtype):
    sharding = None if model.layout is None else batch_sharding(name, dims, model.layout)
    return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

  return batches.PackedBatch(**{name: struct(name, *spec) for name, spec in specs.items()})


def place_batch(batch, layout, part=0, parts=1):
  """The part-th of `parts` of a step's rows -> global arrays, placed by `batch_sharding`."""

  def place(name, value):
    if value is None:
      return None
    return multihost.place_rows(value, lambda shape: batch_sharding(name, shape, layout), part, parts)

  return dataclasses.replace(
    batch, **{f.name: place(f.name, getattr(batch, f.name)) for f in dataclasses.fields(batch)}
  )
