"""Training the text-to-video model: what a step is.

A batch of packed clips, a noise level for each clip, noise for each token; the model sees data mixed with
noise and says which way the noise lies; the loss is its squared error over all tokens that are not given.
Equations: diffusion/flow.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sora_jax import batch as batches, flops, layout as layouts, multihost, optim
from sora_jax.diffusion import flow

# xxHash's, one an axis: what stands elsewhere counts differently
PRIMES = (2654435761, 2246822519, 3266489917)
BLOCKS = (1024, 512, 256, 128)  # tokens that are dealt to a device together: tiles of attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
  """All that training carries from step to step.

  `ema` is the running mean of the weights, float32, or {} where none is kept. `bad` tells of updates that
  were left out lately (optim.count_bad), `history` is what the next one is compared with (optim.judge).
  """

  step: jax.Array
  params: dict
  ema: dict
  opt: tuple
  bad: jax.Array
  history: jax.Array  # [2, W]


def boxed_weights(model):
  """Shapes of the weights with their logical axes."""
  return jax.eval_shape(model.init, jax.random.key(0))


def abstract_state(model, tx, ema=True):
  """State of ShapeDtypeStructs with their shardings: what a checkpoint is restored into, and what
  `init_state` returns. ema: whether a running mean is kept.
  """
  params, opt = optim.abstract(tx, boxed_weights(model), model.layout)

  def everywhere(shape, dtype):
    sharding = None if model.layout is None else model.layout.fitted(shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def mean(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)

  scalar, history = everywhere((), jnp.int32), everywhere((2, optim.WINDOW), jnp.float32)
  return State(scalar, params, jax.tree.map(mean, params) if ema else {}, opt, scalar, history)


def state_of(params, model, tx, ema=True):
  """A State that begins with these weights, which it takes (they are donated)."""
  make = functools.partial(_first_state, tx=tx, ema=ema)
  return jax.jit(make, out_shardings=shardings(model, tx, ema), donate_argnums=0)(params)


def init_state(model, tx, key, ema=True):
  """A new State; every weight is made where it lives."""

  def make(key):
    return _first_state(layouts.unbox(model.init(key)), tx, ema)

  return jax.jit(make, out_shardings=shardings(model, tx, ema))(key)


def _first_state(params, tx, ema):
  """The State before the first update: the running mean begins with the weights."""
  zero = jnp.zeros((), jnp.int32)
  mean = jax.tree.map(lambda x: jnp.copy(x.astype(jnp.float32)), params) if ema else {}
  opt = tx.init(optim.in_float32(params))
  return State(zero, params, mean, opt, jnp.copy(zero), optim.no_history())


def shardings(model, tx, ema=True):
  """Where the leaves of a State live; None without a layout."""
  if model.layout is None:
    return None
  return jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, tx, ema))


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


def loss_fn(params, model, batch, key, sigma, frozen=None, count=None):
  """Mean squared error of the velocity, weighted by noise level (flow.loss_weight), over all not-given tokens
  of the global batch. -> scalar

  frozen: weights beside `params`, by key, which no gradient is taken of (those that adapters adapt). count:
  what the sum over tokens is divided by, where the batch is a part of a larger one.
  """
  params = {**(frozen or {}), **params}
  x_BLP, noise_BLP, sigma_BU, sigma_index_BL, _ = noised(batch, key, sigma)
  text_BSE = model.embed_text(params, batch)
  predicted = model.velocity(params, x_BLP, batch, sigma_BU, sigma_index_BL, text_BSE)
  weight_BL = flow.loss_weight(flow.gather_sigma(sigma_BU, sigma_index_BL)[..., 0], sigma)
  total, tokens = flow.velocity_loss(
    predicted, batch.tokens_BLP, noise_BLP, batch.segment_BL, batch.given_BL, weight_BL
  )
  return total / jnp.maximum(tokens if count is None else count, 1)


def loss_and_grads(params, model, batch, key, sigma, frozen=None, micro_steps=1):
  """`loss_fn` and its gradient, in float32. With micro_steps > 1 so many parts of the rows one after another,
  whose gradients are added: the same numbers, with the activations of one part in memory.
  """
  if micro_steps == 1:
    loss, grads = jax.value_and_grad(loss_fn)(params, model, batch, key, sigma, frozen)
    return loss, optim.in_float32(grads)
  count = jnp.sum((batch.segment_BL > 0) & ~batch.given_BL)

  def add(sums, part):
    part = _constrained(part, model.layout)
    loss, grads = jax.value_and_grad(loss_fn)(params, model, part, key, sigma, frozen, count)
    return jax.tree.map(jnp.add, sums, (loss, optim.in_float32(grads))), None

  def split(x):  # [B, ...] -> [micro_steps, B / micro_steps, ...]; the rows of a device stay on it
    return jnp.moveaxis(x.reshape(-1, micro_steps, *x.shape[1:]), 1, 0)

  zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
  sums, _ = jax.lax.scan(add, (jnp.zeros(()), zeros), jax.tree.map(split, batch))
  return sums


def _constrained(batch, layout):
  """The batch, kept inside jit where `place_batch` puts such a one."""
  if layout is None:
    return batch
  arrays = {name: value for name, value in vars(batch).items() if value is not None}
  placed = {
    name: jax.lax.with_sharding_constraint(value, batch_sharding(name, value.shape, layout))
    for name, value in arrays.items()
  }
  return dataclasses.replace(batch, **placed)


def train_step(state, batch, key, frozen=None, *, model, tx, ema_decay, sigma, spike=0.0, micro_steps=1):
  """One update. (State, PackedBatch, key of the run) -> (State, metrics); same inputs, same outputs.

  The noise of a clip depends on the key, its uid and its epoch, so a resumed run replays it. An update whose
  loss or gradient is not finite, or a spike (optim.judge), leaves params, ema and opt as they were; `step`
  goes on, `bad` counts it, and metrics["not_finite"] or metrics["spike"] is 1.
  """
  loss, grads = loss_and_grads(state.params, model, batch, key, sigma, frozen, micro_steps)
  grad_norm = optax.tree.norm(grads)
  finite, spiking, history = optim.judge(state.history, state.step, loss, grad_norm, spike)
  taken = finite & ~spiking
  updates, opt = tx.update(grads, state.opt, optim.in_float32(state.params))
  params = optim.apply_updates(state.params, updates, state.step)
  ema = optim.ema_update(state.ema, params, state.step, ema_decay)
  params, ema, opt = optim.keep_if(taken, (params, ema, opt), (state.params, state.ema, state.opt))
  bad = optim.count_bad(state.bad, taken)
  metrics = {
    "loss": loss,
    "grad_norm": grad_norm,
    "bad": bad,
    "not_finite": (~finite).astype(jnp.int32),
    "spike": spiking.astype(jnp.int32),
    "tokens": jnp.sum(batch.segment_BL > 0),
    "flops": model_flops(batch, model),
    "data_checksum": checksum(batch, model.layout),
  }
  return State(state.step + 1, params, ema, opt, bad, history), metrics


def model_flops(batch, model):
  """FLOPs of the update that the clips of the whole batch need (flops.step), float32.

  Each clip has one prompt, as data/loader.py packs them.
  """
  numbers_G = jnp.arange(1, batch.uid_BG2.shape[1] + 1)
  tokens_BG = jnp.sum(batch.segment_BL[:, :, None] == numbers_G, 1)
  text_BG = jnp.sum(batch.prompt_BS[:, :, None] == numbers_G, 1)
  return flops.step(model.dit, tokens_BG, text_BG, frozen=model.lora is not None)


def jit_step(model, tx, *, ema_decay, sigma, spike=0.0, micro_steps=1):
  """The compiled update, (State, PackedBatch, key, frozen=None) -> (State, metrics), see `train_step`. It
  donates the State.

  ema_decay 0: no running mean is kept. What launch.train runs and what launch.preflight compiles:
  `jit_step(...).lower(abstract_state(...), batch_shapes(...), key)`.
  """
  step = functools.partial(
    train_step, model=model, tx=tx, ema_decay=ema_decay, sigma=sigma, spike=spike, micro_steps=micro_steps
  )
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings(model, tx, ema_decay > 0), None))


def loss_at_sigma(params, batch, key, value, *, model):
  """Held-out loss with every clip at one noise level: (sum over tokens, tokens that count)."""
  keys_BG = flow.clip_keys(key, batch.uid_BG2, batch.epoch_BG)
  sigma_BG = jnp.full(batch.fps_BG.shape, value, jnp.float32)
  x_BLP, noise_BLP, sigma_BU, sigma_index_BL = mixed(batch, keys_BG, sigma_BG)
  predicted = model.velocity(params, x_BLP, batch, sigma_BU, sigma_index_BL, model.embed_text(params, batch))
  return flow.velocity_loss(predicted, batch.tokens_BLP, noise_BLP, batch.segment_BL, batch.given_BL)


def checksum(batch, layout=None):
  """A number of 32 bits that tells a batch from others: of the tokens, segments and texts of all its rows, in
  integers, so that it does not depend on how the batch is cut over devices. `layout`: that of `place_batch`.
  """
  order = dealing(batch.segment_BL.shape, layout)
  arrays = [
    (batch.tokens_BLP, order),
    (batch.segment_BL, order),
    (batch.text_BS, None),
    (batch.text_BSE, None),
  ]
  total = jnp.uint32(0)
  for value, order in arrays:
    if value is not None:
      bits = jax.lax.bitcast_convert_type(value.astype(jnp.float32), jnp.uint32)
      position = jnp.uint32(0)
      for axis in range(bits.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        if axis == 1 and order is not None:
          index = jnp.asarray(order, jnp.uint32).reshape(1, -1, *[1] * (bits.ndim - 2))
        position += index * jnp.uint32(PRIMES[axis])
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


def dealing(shape_BL, layout):
  """The order of the tokens of a row that is cut over devices: [L] positions; None: as they come.

  Blocks of tokens are dealt to the devices in turn, so that each has some of every clip: where it attends
  from its own tokens to all (attention._over_devices), all have as much to do. A block is a tile of
  attention, so dealing changes none of the tiles that are skipped. The model does not depend on the order.
  """
  length = shape_BL[1]
  ways = 1 if layout is None else layout.ways(layout.fitted(shape_BL, "act_batch", "act_length").spec[1])
  block = next((block for block in BLOCKS if ways > 1 and length % (ways * block) == 0), None)
  if block is None:
    return None
  return np.arange(length).reshape(-1, ways, block).swapaxes(0, 1).reshape(-1)


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
  """The part-th of `parts` of a step's rows -> global arrays, placed by `batch_sharding`, tokens in the order
  of `dealing`.
  """
  rows, length = batch.segment_BL.shape
  order = dealing((rows * parts, length), layout)

  def place(name, value):
    if value is None:
      return None
    if order is not None and name.rsplit("_", 1)[1].startswith("BL"):
      value = value[:, order]
    return multihost.place_rows(value, lambda shape: batch_sharding(name, shape, layout), part, parts)

  return dataclasses.replace(
    batch, **{f.name: place(f.name, getattr(batch, f.name)) for f in dataclasses.fields(batch)}
  )
