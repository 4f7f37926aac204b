"""The deliberate bugs that the suite must notice, each as a change of the product's source on every path that has it.

Data for test_mutations.py. `old` stands in its file exactly once, or the mutation no longer applies.
"""

from dataclasses import dataclass

__all__ = ["BESIDES", "BUGS", "MUTATIONS", "Mutation"]

# The sixteen, in their usual order.
BUGS = (
    "no noise",
    "half noise",
    "noise not scaled by C",
    "clip after averaging",
    "per-layer clip for flat",
    "reused seed",
    "fixed size accounted as Poisson",
    "seeded sampler",
    "fork before keying",
    "a NaN record",
    "a 0-d parameter unclipped",
    "send before fsync",
    "C where 2C is due",
    "a truncated batch",
    "an un-noised head",
    "exception text leaving",
)
# Not among them, and as bad.
BESIDES = "besides"


@dataclass(frozen=True)
class Mutation:
    """One change of one file.

    Attributes:
        bug: which of the deliberate bugs.
        path: the code path that has it.
        file: below the repository.
        old: the text that goes.
        new: the text that comes.
        tests: the smallest part of the quick suite that should notice, below tests/.
    """

    bug: str
    path: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


_MECHANISM, _CLIPPING, _TRAIN = "federated/mechanism.py", "federated/clipping.py", "federated/train.py"
_GRADIENTS = "federated/batch_gradients.py"
_SUMS, _PARTS = "federated/per_record.py", "federated/per_record_parts.py"
_GRID, _NOISE, _COHORTS = "federated/secure_noise.py", "federated/noise.py", "federated/cohorts.py"
_CLIENT, _OWNER, _FEDERATION = "federated/client_app.py", "federated/owner.py", "federated/federation.py"
_STATISTIC, _EVALUATION, _LEDGER = "federated/noisy_sum.py", "federated/evaluation.py", "federated/ledger.py"

_T_MECHANISM, _T_TRAIN, _T_CLIPPING = ("test_mechanism.py",), ("test_train.py",), ("test_clipping.py",)
_T_SUMS, _T_GRID, _T_NOISE = ("test_per_record.py",), ("test_secure_noise.py",), ("test_noise.py",)
_T_COHORTS, _T_CLIENT, _T_LEDGER = ("test_cohorts.py",), ("test_client_app.py",), ("test_ledger.py",)
# Single tests of files that take long until they come to it.
_LEARNED_CLIP = ("test_cohorts.py::test_a_round_that_learns_its_clip_is_one_gaussian_event_at_that_rounds_clip",)
_EVERY_NUMBER = ("test_mechanism.py::test_every_number_of_every_tensor_has_a_noise_of_its_own",)
_ALL_COINS = ("test_mechanism.py::test_a_batch_or_cohort_is_everybody_whose_coin_says_so_however_many_that_are",)
_WHOLE_UPDATE = (
    "test_train.py::test_under_unit_local_what_leaves_is_the_clipped_update_and_noise_for_twice_the_bound",
)
_OWN_CLIP = ("test_train.py::test_a_client_clips_its_own_update_and_says_whether_it_had_to",)
_LARGE_MODEL = ("test_train.py::test_noise_of_a_large_model_is_drawn_as_one_and_added_in_blocks",)
_MEMBER = ("test_client_app.py::test_a_member_of_a_cohort_whose_records_break_says_one_constant_and_keeps_the_text",)
_FINDER = ("test_client_app.py::test_an_owner_that_cannot_be_found_is_a_constant_and_the_shared_log_holds_no_text",)
_CANARY = ("test_canary_bytes.py::test_no_output_of_a_run_holds_what_a_record_holds",)
_T_DATA, _T_EVALUATION = ("test_private_data.py",), ("test_evaluation.py",)

_RECORD_NOISE = "            total = _add_noise(total, self.noise_multiplier * self.max_grad_norm, randomness)\n"
_CLIENT_NOISE = "        noised = _add_noise_to_arrays(total, multiplier * bound, randomness)\n"
_LOCAL_NOISE = "return _add_noise_to_arrays(clipped, 2.0 * self.noise_multiplier * self.max_grad_norm, randomness)"
_GRID_NOISE = "    total += np.rint(generator.gaussian(size, noise_multiplier * clip_norm) / step).astype(np.int64)\n"
_FAST_STEP = (
    "        return adder.split(torch.cat(mechanism.noised(list(torch.split(total, _NOISE_BLOCK)), randomness)))\n"
)
_SLOW_STEP = "            return mechanism.noisy_mean(self._gradients(batch), shapes, randomness)\n"
_TWIN = 'type(mechanism)(**{**vars(mechanism), "twin": True, "noise_multiplier": 0.0})'
_BIT_NOISE = "on_bits = self.mechanism.noise_on_count(self.clip.bit_noise, randomness)"
_SUM_NOISE = "    return mechanism.noisy_mean(chunks, [torch.Size(shape)], randomness)[0]\n"
_COHORT_COUNTS = "self.mechanism.noisy_average(shares, {_COUNTS: np.zeros(2, np.float32)}, randomness)"
_GRID_ROWS = "        flat = (torch.cat([g.reshape(g.shape[0], -1) for g in chunk], dim=1) for chunk in chunks)\n"
_GRID_PIECES = "        return [piece.reshape(shape).float() for piece, shape in zip(pieces, shapes, strict=True)]\n"
_GRID_MEAN = (
    _GRID_ROWS
    + "        total = torch.from_numpy(self._hardened_sum(flat, sum(shape.numel() for shape in shapes), randomness))\n"
    + "        pieces = torch.split(total / self.normaliser, [shape.numel() for shape in shapes])\n"
    + _GRID_PIECES
)
_DRAWN_TO_EVALUATE = "mechanism.draw_cohort(sorted(grid.get_node_ids()), self.randomness(_EVALUATION + server_round))\n"
_RECORDED = (
    "        self.record_release({key: hashlib.sha256(payload).hexdigest() for key, payload in payloads.items()})\n"
)
_ROWS_OF_CLIENTS = "            rows = (_row(update)[None] for update in updates)\n"

_NO_NOISE = [
    Mutation(
        "no noise",
        "record, float",
        _MECHANISM,
        "        if self.noise_multiplier > 0.0:\n" + _RECORD_NOISE,
        "",
        _T_MECHANISM,
    ),
    Mutation("no noise", "grid", _GRID, _GRID_NOISE, "    generator.gaussian(size, 1.0)\n", _T_GRID),
    Mutation(
        "no noise",
        "record, grid",
        _MECHANISM,
        "noise_multiplier=self.noise_multiplier if multiplier is None else multiplier,",
        "noise_multiplier=1e-9,",
        _EVERY_NUMBER,
    ),
    Mutation(
        "no noise",
        "record, sums of the fast step",
        _GRADIENTS,
        _FAST_STEP,
        "        return adder.split(total / mechanism.normaliser)\n",
        _T_TRAIN,
    ),
    Mutation(
        "no noise",
        "record, beyond a block of the fast step",
        _GRADIENTS,
        _FAST_STEP,
        "        first, *others = total.split(_NOISE_BLOCK)\n"
        "        rest = [other / mechanism.normaliser for other in others]\n"
        "        return adder.split(torch.cat([*mechanism.noised([first], randomness), *rest]))\n",
        _LARGE_MODEL,
    ),
    Mutation(
        "no noise",
        "record, gradients from hooks",
        _GRADIENTS,
        _SLOW_STEP,
        f"            return {_TWIN}.noisy_mean(self._gradients(batch), shapes, randomness)\n",
        _T_TRAIN,
    ),
    Mutation(
        "no noise",
        "local, the whole update",
        _TRAIN,
        "self._mechanism.release_locally(_change(arrays, after), randomness)",
        "clip_update(_change(arrays, after), self._mechanism.max_grad_norm)",
        _WHOLE_UPDATE,
    ),
    Mutation("no noise", "local", _MECHANISM, _LOCAL_NOISE, "return clipped", _WHOLE_UPDATE),
    Mutation("no noise", "client", _MECHANISM, _CLIENT_NOISE, "        noised = total\n", _T_COHORTS),
    Mutation("no noise", "client, bits of a learned clip", _COHORTS, _BIT_NOISE, "on_bits = 0.0", _LEARNED_CLIP),
    Mutation(
        "no noise",
        "record, a sum over records",
        _STATISTIC,
        _SUM_NOISE,
        "    return sum((clipped_sum(c, mechanism.max_grad_norm)[0] for c in chunks), start=torch.zeros(shape))\n",
        _T_EVALUATION,
    ),
    Mutation(
        "no noise",
        "local, a sum over records",
        _STATISTIC,
        'released = mechanism.release_locally({"sum": mean}, randomness)["sum"]',
        "released = mean",
        _T_EVALUATION,
    ),
    Mutation(
        "no noise",
        "client, an evaluation",
        _EVALUATION,
        _COHORT_COUNTS,
        _COHORT_COUNTS[:-1] + ", noise_multiplier=0.0)",
        _T_COHORTS,
    ),
    Mutation(
        "no noise",
        "client, a sum over records",
        _FEDERATION,
        "            federation.randomness(-asked.round),\n",
        "            federation.randomness(-asked.round),\n            noise_multiplier=0.0,\n",
        _T_DATA,
    ),
]

_HALF_NOISE = [
    Mutation(
        "half noise",
        "record, float",
        _MECHANISM,
        "_add_noise(total, self.noise_multiplier * ",
        "_add_noise(total, 0.5 * self.noise_multiplier * ",
        _T_MECHANISM,
    ),
    Mutation(
        "half noise",
        "client",
        _MECHANISM,
        "_add_noise_to_arrays(total, multiplier * bound",
        "_add_noise_to_arrays(total, 0.5 * multiplier * bound",
        _T_COHORTS,
    ),
    Mutation(
        "half noise",
        "grid",
        _GRID,
        "generator.gaussian(size, noise_multiplier * clip_norm)",
        "generator.gaussian(size, 0.5 * noise_multiplier * clip_norm)",
        _T_GRID,
    ),
    Mutation(
        "half noise",
        "record, grid",
        _MECHANISM,
        "noise_multiplier=self.noise_multiplier if multiplier is None else multiplier,",
        "noise_multiplier=0.5 * (self.noise_multiplier if multiplier is None else multiplier),",
        _EVERY_NUMBER,
    ),
    Mutation(
        "half noise",
        "the generator",
        _NOISE,
        "return self._generator.standard_normal(count) * standard_deviation",
        "return self._generator.standard_normal(count) * (0.5 * standard_deviation)",
        _T_NOISE,
    ),
    Mutation(
        "half noise",
        "the generator, drawn ahead",
        _NOISE,
        "        drawn *= standard_deviation\n",
        "        drawn *= 0.5 * standard_deviation\n",
        _T_NOISE,
    ),
    Mutation(
        "half noise",
        "the generator, grid",
        _GRID,
        "        values *= standard_deviation\n",
        "        values *= 0.5 * standard_deviation\n",
        _T_GRID,
    ),
    Mutation(
        "half noise",
        "client, bits of a learned clip",
        _COHORTS,
        _BIT_NOISE,
        _BIT_NOISE.replace("(self.clip", "(0.5 * self.clip"),
        _LEARNED_CLIP,
    ),
    Mutation(
        "half noise",
        "client, updates that do not pay for the bits",
        _COHORTS,
        "            multiplier = self.clip.update_noise_multiplier(multiplier)\n",
        "",
        _LEARNED_CLIP,
    ),
    Mutation(
        "half noise",
        "record, an evaluation",
        _STATISTIC,
        "noise_multiplier=noise_multiplier if mechanism.private else 0.0,",
        "noise_multiplier=0.5 * noise_multiplier if mechanism.private else 0.0,",
        _T_EVALUATION,
    ),
]

_NOISE_WITHOUT_C = [
    Mutation(
        "noise not scaled by C",
        "record, float",
        _MECHANISM,
        "self.noise_multiplier * self.max_grad_norm, randomness)\n        return [gradient",
        "self.noise_multiplier, randomness)\n        return [gradient",
        _T_MECHANISM,
    ),
    Mutation(
        "noise not scaled by C",
        "client",
        _MECHANISM,
        "multiplier * bound, randomness",
        "multiplier, randomness",
        _T_COHORTS,
    ),
    Mutation(
        "noise not scaled by C",
        "client, a learned clip",
        _MECHANISM,
        "multiplier * bound, randomness",
        "multiplier * self.max_grad_norm, randomness",
        _LEARNED_CLIP,
    ),
    Mutation(
        "noise not scaled by C",
        "client, a learned clip on the grid",
        _MECHANISM,
        "row = self._hardened_sum(rows, _row(like).size, randomness, bound=bound, multiplier=multiplier)",
        "multiplier *= self.max_grad_norm / bound\n"
        "            row = self._hardened_sum(rows, _row(like).size, randomness, bound=bound, multiplier=multiplier)",
        _LEARNED_CLIP,
    ),
    Mutation(
        "noise not scaled by C",
        "local",
        _MECHANISM,
        "2.0 * self.noise_multiplier * self.max_grad_norm, randomness",
        "2.0 * self.noise_multiplier, randomness",
        _WHOLE_UPDATE,
    ),
    Mutation(
        "noise not scaled by C",
        "grid",
        _GRID,
        "generator.gaussian(size, noise_multiplier * clip_norm)",
        "generator.gaussian(size, noise_multiplier)",
        _T_GRID,
    ),
]

_CLIP_AFTER = [
    Mutation(
        "clip after averaging",
        "record, float",
        _CLIPPING,
        "    records = gradients[0].shape[0]\n",
        "    gradients = [g.sum(0, keepdim=True) for g in gradients]\n    records = 1\n",
        _T_MECHANISM,
    ),
    Mutation(
        "clip after averaging",
        "record, sums of the fast step",
        _SUMS,
        "            self._add(places, inputs[start : start + size], labels[start : start + size], max_grad_norm)\n"
        "        return total\n",
        "            self._add(places, inputs[start : start + size], labels[start : start + size], 1e29)\n"
        "        return total * min(1.0, max_grad_norm / max(1e-30, float(total.norm())))\n",
        _T_SUMS,
    ),
    Mutation(
        "clip after averaging",
        "grid",
        _GRID,
        "_clipped(vectors[start : start + rows], clip_norm)",
        "_clipped(vectors[start : start + rows].sum(axis=0)[None], clip_norm)",
        _T_GRID,
    ),
    Mutation(
        "clip after averaging",
        "client",
        _MECHANISM,
        "            for name, array in clip_update(update, bound).items():\n"
        "                total[name] += array\n" + _CLIENT_NOISE,
        "            for name, array in update.items():\n"
        "                total[name] += array\n"
        "        noised = _add_noise_to_arrays(clip_update(total, bound), multiplier * bound, randomness)\n",
        _T_COHORTS,
    ),
    Mutation(
        "clip after averaging",
        "client, whose clip is taken on trust",
        _MECHANISM,
        "for name, array in clip_update(update, bound).items():",
        "for name, array in update.items():",
        _T_COHORTS,
    ),
    Mutation(
        "clip after averaging",
        "client, grid",
        _MECHANISM,
        _ROWS_OF_CLIENTS,
        "            rows = [sum((_row(update) for update in updates), start=np.zeros(_row(like).size))[None]]\n",
        _LEARNED_CLIP,
    ),
    Mutation(
        "clip after averaging",
        "local, not at all",
        _MECHANISM,
        "        clipped = clip_update(update, self.max_grad_norm)\n",
        "        clipped = {name: np.asarray(array, dtype=np.float64) for name, array in update.items()}\n",
        _WHOLE_UPDATE,
    ),
    Mutation(
        "clip after averaging",
        "client, its own update",
        _TRAIN,
        "        changed = clip_update(update, clip_norm)\n",
        "        changed = clip_update(update, 1e9)\n",
        _OWN_CLIP,
    ),
    Mutation(
        "clip after averaging",
        "client, the mean of a statistic",
        _STATISTIC,
        "        total += clipped_sum([rows], norm_bound)[0]\n",
        "        total += rows.sum(0)\n",
        _T_DATA,
    ),
]

_PER_LAYER = [
    Mutation(
        "per-layer clip for flat",
        "record, float",
        _CLIPPING,
        "    return [(factors @ g).reshape(",
        "    norms = [torch.linalg.vector_norm(g, dim=1, dtype=torch.float64) for g in flat]\n"
        "    by_layer = iter([clip_factors(norm, max_grad_norm)[0] for norm in norms])\n"
        "    return [(next(by_layer) @ g).reshape(",
        _T_MECHANISM,
    ),
    Mutation(
        "per-layer clip for flat",
        "record, sums of the fast step",
        _SUMS,
        "                part.add([places[parameter] for parameter in self._layers[layer]], factors, mask)\n",
        "                alone = norm_from_above([part], records=len(inputs), parameters=sum(self._sizes))\n"
        "                of_layer = clip_factors(alone, max_grad_norm)[0]\n"
        "                part.add([places[parameter] for parameter in self._layers[layer]], of_layer, mask)\n",
        _T_SUMS,
    ),
    Mutation(
        "per-layer clip for flat",
        "record, grid",
        _MECHANISM,
        _GRID_MEAN,
        "        held = [list(chunk) for chunk in chunks]\n"
        "        rows = [[chunk[i].reshape(len(chunk[i]), -1) for chunk in held] for i in range(len(shapes))]\n"
        "        sums = [self._hardened_sum(r, s.numel(), randomness) for r, s in zip(rows, shapes, strict=True)]\n"
        "        pieces = [torch.from_numpy(total / self.normaliser) for total in sums]\n" + _GRID_PIECES,
        _EVERY_NUMBER,
    ),
    Mutation(
        "per-layer clip for flat",
        "client and local",
        _CLIPPING,
        "    return {name: np.asarray(array * factor) for name, array in wide.items()}\n",
        "    bound = clip_norm * CLIP_SLACK\n"
        "    factors = {name: min(1.0, bound / max(1e-300, update_norm({name: wide[name]}))) for name in wide}\n"
        "    return {name: np.asarray(array * factors[name]) for name, array in wide.items()}\n",
        _T_CLIPPING,
    ),
    Mutation(
        "per-layer clip for flat",
        "client, grid",
        _MECHANISM,
        _ROWS_OF_CLIENTS,
        "            def row_of(update):\n"
        "                parts = [clip_update({name: array}, bound) for name, array in update.items()]\n"
        "                return np.concatenate([_row(part) for part in parts])\n"
        "            updates = list(updates)\n"
        "            rows, bound = (row_of(update)[None] for update in updates), bound * math.sqrt(len(like))\n"
        "            multiplier /= math.sqrt(len(like))\n",
        _LEARNED_CLIP,
    ),
]

_REUSED_SEED = [
    Mutation("reused seed", "the generator", _NOISE, "secrets.randbits(256)", "7", _T_NOISE),
    Mutation("reused seed", "the generator, one seed a process", _NOISE, "secrets.randbits(256)", "process", _T_NOISE),
    Mutation("reused seed", "the generator, grid", _GRID, "self._use(os.urandom(32))", "self._use(bytes(32))", _T_GRID),
    Mutation(
        "reused seed",
        "what a run draws from",
        "edge/composition.py",
        "    if not mechanism.private or mechanism.void:\n",
        "    if seed or True:\n",
        ("test_void.py::test_without_the_option_two_runs_differ",),
    ),
    Mutation(
        "reused seed",
        "record, noise from a constant",
        _MECHANISM,
        "    noise = torch.from_numpy(randomness.gaussian(",
        "    from tacit.federated.noise import SeededGenerator\n"
        "    noise = torch.from_numpy(SeededGenerator(1).gaussian(",
        _EVERY_NUMBER,
    ),
    Mutation(
        "reused seed",
        "client and local, noise from a constant",
        _MECHANISM,
        "    noise = randomness.gaussian(sum(array.size",
        "    from tacit.federated.noise import SeededGenerator\n    noise = SeededGenerator(1).gaussian(sum(array.size",
        _T_COHORTS,
    ),
    Mutation(
        "reused seed",
        "grid, noise from a constant",
        _MECHANISM,
        "            generator=randomness,\n",
        '            generator=__import__("tacit.federated.noise", fromlist=["x"]).SeededGenerator(1),\n',
        _EVERY_NUMBER,
    ),
    Mutation(
        "reused seed",
        "record, one noise for every tensor",
        _MECHANISM,
        "    pieces = torch.split(noise, [t.numel() for t in total])\n",
        "    pieces = [noise[: t.numel()] for t in total]\n",
        _T_TRAIN,
    ),
    Mutation(
        "reused seed",
        "client and local, one noise for every array",
        _MECHANISM,
        "    pieces = _unrow(noise, arrays)\n",
        "    pieces = {name: noise[: array.size].reshape(array.shape) for name, array in arrays.items()}\n",
        _LEARNED_CLIP,
    ),
]

_FIXED_SIZE = [
    Mutation(
        "fixed size accounted as Poisson",
        "record",
        _MECHANISM,
        "        return np.flatnonzero(randomness.bernoulli(size, self.sample_rate))\n",
        "        places = np.argsort(randomness.gaussian(size, 1.0))\n"
        "        return np.sort(places[: round(size * self.sample_rate)])\n",
        _T_MECHANISM,
    ),
    Mutation(
        "fixed size accounted as Poisson",
        "record, in the trainer",
        _TRAIN,
        "        return self._mechanism.draw_batch(size, randomness)\n",
        "        count = round(size * self._mechanism.sample_rate)\n"
        "        return np.argsort(randomness.gaussian(size, 1.0))[:count]\n",
        _T_TRAIN,
    ),
    Mutation(
        "fixed size accounted as Poisson",
        "client",
        _MECHANISM,
        "        coins = randomness.bernoulli(len(clients), self.sample_rate)\n",
        "        ranks = np.argsort(np.argsort(randomness.gaussian(len(clients), 1.0)))\n"
        "        coins = ranks < round(len(clients) * self.sample_rate)\n",
        _T_COHORTS,
    ),
    Mutation(
        "fixed size accounted as Poisson",
        "client, an empty cohort filled up",
        _COHORTS,
        "        cohort = self.mechanism.draw_cohort(clients, self.randomness(server_round))\n",
        "        cohort = self.mechanism.draw_cohort(clients, self.randomness(server_round)) or clients[:1]\n",
        _T_COHORTS,
    ),
    Mutation(
        "fixed size accounted as Poisson",
        "client, everybody",
        _COHORTS,
        "        cohort = self.mechanism.draw_cohort(clients, self.randomness(server_round))\n",
        "        cohort = clients\n",
        _T_COHORTS,
    ),
    Mutation(
        "fixed size accounted as Poisson",
        "client, an evaluation",
        _COHORTS,
        "        cohort = " + _DRAWN_TO_EVALUATE,
        "        cohort = sorted(grid.get_node_ids())[:: round(1 / mechanism.sample_rate)]\n",
        _T_COHORTS,
    ),
    Mutation(
        "fixed size accounted as Poisson",
        "client, a sum over records",
        _FEDERATION,
        "        cohort = asked.mechanism.draw_cohort(clients, federation.randomness(asked.round))\n",
        "        cohort = clients[: round(len(clients) * asked.mechanism.sample_rate)]\n",
        _T_DATA,
    ),
    Mutation(
        "fixed size accounted as Poisson",
        "record, an empty batch left out",
        _TRAIN,
        "        private = self._mechanism.per_record\n",
        "        private = self._mechanism.per_record\n        if len(batch) == 0:\n            return\n",
        _T_TRAIN,
    ),
]

_SEEDED_SAMPLER = [
    Mutation(
        "seeded sampler",
        "record",
        _MECHANISM,
        "np.flatnonzero(randomness.bernoulli(size, self.sample_rate))",
        "np.flatnonzero(np.random.random(size) < self.sample_rate)",
        (*_T_MECHANISM, *_T_TRAIN),
    ),
    Mutation(
        "seeded sampler",
        "record, in the trainer",
        _TRAIN,
        "        return self._mechanism.draw_batch(size, randomness)\n",
        "        from tacit.federated.noise import SeededGenerator\n"
        "        return self._mechanism.draw_batch(size, SeededGenerator(size))\n",
        _T_TRAIN,
    ),
    Mutation(
        "seeded sampler",
        "client",
        _MECHANISM,
        "coins = randomness.bernoulli(len(clients), self.sample_rate)",
        "coins = np.random.random(len(clients)) < self.sample_rate",
        _T_COHORTS,
    ),
    Mutation(
        "seeded sampler",
        "client, by round",
        _COHORTS,
        "        cohort = self.mechanism.draw_cohort(clients, self.randomness(server_round))\n",
        "        from tacit.federated.noise import SeededGenerator\n"
        "        cohort = self.mechanism.draw_cohort(clients, SeededGenerator(server_round))\n",
        _T_COHORTS,
    ),
    Mutation(
        "seeded sampler",
        "client, an evaluation",
        _COHORTS,
        "self.randomness(_EVALUATION + server_round))\n        return ask",
        'type("Seeded", (), {"bernoulli": lambda _, n, q: np.random.default_rng(n).random(n) < q})())\n'
        "        return ask",
        _T_COHORTS,
    ),
    Mutation(
        "seeded sampler",
        "client, a sum over records",
        _FEDERATION,
        "cohort = asked.mechanism.draw_cohort(clients, federation.randomness(asked.round))",
        "cohort = [c for c, coin in zip(clients, np.random.default_rng(0).random(len(clients)), strict=True)\n"
        "                  if coin < asked.mechanism.sample_rate]",
        _T_DATA,
    ),
]

_FORK = [
    Mutation(
        "fork before keying",
        "the generator",
        _NOISE,
        "if self._stream is None or process != self._process:",
        "if self._stream is None:",
        _T_NOISE,
    ),
    Mutation(
        "reused seed",
        "noise that was drawn ahead is given twice",
        _NOISE,
        "        self._ready = None\n        if again:  # who asked",
        "        if again and self._ready is None:  # who asked",
        _T_NOISE,
    ),
    Mutation(
        "fork before keying",
        "grid, the fence in Python",
        _GRID,
        "    def _forget(self) -> None:\n        self._stream = None\n",
        "    def _forget(self) -> None:\n        return\n",
        _T_GRID,
    ),
    Mutation(
        "fork before keying",
        "grid, the fence by process",
        _GRID,
        "if stream is None or self._process != os.getpid() or self._left_bytes < length_bytes:",
        "if stream is None or self._left_bytes < length_bytes:",
        _T_GRID,
    ),
]

_NAN = [
    Mutation(
        "a NaN record",
        "record, every factor usable",
        _CLIPPING,
        "    usable = norms < _LARGEST_NORM  # false for NaN as well\n",
        "    usable = torch.ones_like(norms, dtype=torch.bool)\n",
        _T_MECHANISM,
    ),
    Mutation(
        "a NaN record",
        "record, times zero instead of masked",
        _CLIPPING,
        "    if not bool(usable.all()):\n",
        "    if not len(usable):\n",
        _T_MECHANISM,
    ),
    Mutation(
        "a NaN record",
        "record, sums of the fast step",
        _SUMS,
        "            mask = None if bool(usable.all()) else usable\n",
        "            mask = None\n",
        _T_SUMS,
    ),
    Mutation(
        "a NaN record",
        "record, in a layer of the fast step",
        _PARTS,
        "    return values.masked_fill(~usable.view(-1, *[1] * (values.dim() - 1)), 0.0)\n",
        "    return values\n",
        _T_SUMS,
    ),
    Mutation(
        "a NaN record",
        "record, too large an input of the fast step",
        _PARTS,
        "    return torch.where(squares.amax(1) < _LARGEST_NORM**2, norms, math.nan).float()[:, None].to(device)\n",
        "    return norms.float()[:, None].to(device)\n",
        _T_SUMS,
    ),
    Mutation(
        "a NaN record",
        "grid",
        _GRID,
        "    if not usable.all():\n        vectors[~usable] = 0.0\n",
        "",
        _T_GRID,
    ),
    Mutation(
        "a NaN record",
        "client and local",
        _CLIPPING,
        "    if not math.isfinite(norm):\n",
        "    if norm < 0.0:\n",
        _T_CLIPPING,
    ),
    Mutation(
        "a NaN record",
        "a result that is not finite",
        _OWNER,
        "        if not all(np.isfinite(array).all() for array in arrays.values()):\n",
        "        if not arrays:\n",
        _T_CLIENT,
    ),
]

_NO_DIMENSION = [
    Mutation(
        "a 0-d parameter unclipped",
        "record, left out of the norm",
        _CLIPPING,
        "    squares = sum(torch.linalg.vector_norm(g, dim=1, dtype=torch.float64) ** 2 for g in flat)\n",
        "    wide = [f for f, g in zip(flat, gradients, strict=True) if g.dim() > 1] or [torch.zeros(records, 1)]\n"
        "    squares = sum(torch.linalg.vector_norm(g, dim=1, dtype=torch.float64) ** 2 for g in wide)\n",
        _T_MECHANISM,
    ),
    Mutation(
        "a 0-d parameter unclipped",
        "record, left out of the clip",
        _CLIPPING,
        "    return [(factors @ g).reshape(original.shape[1:])",
        "    return [((factors if original.dim() > 1 else usable.float()) @ g).reshape(original.shape[1:])",
        _T_MECHANISM,
    ),
    Mutation(
        "a 0-d parameter unclipped",
        "record, grid",
        _MECHANISM,
        _GRID_MEAN,
        "        chunks = [[g.double() for g in chunk] for chunk in chunks]\n"
        "        loose = [sum(c[i].sum() for c in chunks) if not s else 0.0 for i, s in enumerate(shapes)]\n"
        "        kept = [[g if g.dim() > 1 else g * 0.0 for g in chunk] for chunk in chunks]\n"
        "        flat = (torch.cat([g.reshape(g.shape[0], -1) for g in chunk], dim=1) for chunk in kept)\n"
        "        size = sum(shape.numel() for shape in shapes)\n"
        "        total = torch.from_numpy(self._hardened_sum(flat, size, randomness))\n"
        "        pieces = torch.split(total / self.normaliser, [shape.numel() for shape in shapes])\n"
        "        pieces = [p + extra / self.normaliser for p, extra in zip(pieces, loose, strict=True)]\n"
        + _GRID_PIECES,
        _EVERY_NUMBER,
    ),
    Mutation(
        "a 0-d parameter unclipped",
        "client and local, left out of the norm",
        _CLIPPING,
        "dtype=np.float64))) for array in update.values()))",
        "dtype=np.float64))) for array in update.values() if array.ndim))",
        _T_CLIPPING,
    ),
    Mutation(
        "a 0-d parameter unclipped",
        "client and local, left out of the clip",
        _CLIPPING,
        "np.asarray(array * factor) for name",
        "np.asarray(array * factor if array.ndim else array) for name",
        _T_CLIPPING,
    ),
]

_ORDER = [
    Mutation(
        "send before fsync",
        "a file without fsync",
        "devices/durable.py",
        "            os.fsync(file.fileno())\n",
        "",
        ("test_durable.py", "test_system_calls.py"),
    ),
    Mutation(
        "send before fsync",
        "a name without fsync of its folder",
        "devices/durable.py",
        '    reach("durable.after_rename")\n    sync_folder(path.parent)\n',
        '    reach("durable.after_rename")\n',
        ("test_durable.py", "test_system_calls.py"),
    ),
    Mutation(
        "send before fsync",
        "an entry without fsync",
        "federated/chain.py",
        '            reach("chain.before_fsync")\n            os.fsync(self._descriptor)\n',
        '            reach("chain.before_fsync")\n',
        ("test_chain.py",),
    ),
    Mutation(
        "send before fsync",
        "a payload that is not made durable",
        "federated/outbox.py",
        '        write_durably(self._folder / name, line + b"".join(payloads.values()), mode=0o600)\n',
        '        (self._folder / name).write_bytes(line + b"".join(payloads.values()))\n',
        ("test_ledger.py", "test_system_calls.py"),
    ),
    Mutation(
        "send before fsync",
        "the release before its payload",
        _LEDGER,
        '        self._outbox.put(round_number, payloads)\n        reach("ledger.after_outbox")\n' + _RECORDED,
        _RECORDED + '        reach("ledger.after_outbox")\n        self._outbox.put(round_number, payloads)\n',
        _T_LEDGER,
    ),
    Mutation(
        "send before fsync",
        "the release before its payload, ledgers at home",
        "federated/owner_ledgers.py",
        "        self._outbox.put(round_number, payloads)\n"
        '        reach("ledger.after_outbox")\n'
        "        digests = {key: hashlib.sha256(payload).hexdigest() for key, payload in payloads.items()}\n"
        "        _at_once(lambda o: self._ledgers[o].record_release({key: digests[key] for key in by_owner[o]}), "
        "list(by_owner))\n",
        "        digests = {key: hashlib.sha256(payload).hexdigest() for key, payload in payloads.items()}\n"
        "        _at_once(lambda o: self._ledgers[o].record_release({key: digests[key] for key in by_owner[o]}), "
        "list(by_owner))\n"
        '        reach("ledger.after_outbox")\n'
        "        self._outbox.put(round_number, payloads)\n",
        ("test_system_calls.py", "test_owner_ledgers.py"),
    ),
    Mutation(
        "send before fsync",
        "the charge is not waited for",
        _LEDGER,
        "        self._record(list(drafts.values()))\n        self._granted.update(",
        "        self._granted.update(",
        _T_LEDGER,
    ),
    Mutation(
        "send before fsync",
        "records before their charge",
        _OWNER,
        "    turn = gate.reserve(request)\n",
        "    early = compute()\n    compute = lambda: early\n    turn = gate.reserve(request)\n",
        _T_CLIENT,
    ),
    Mutation(
        "send before fsync",
        "a reply before its release",
        _OWNER,
        "    gate.release(request, payload)\n",
        "",
        _T_CLIENT,
    ),
    Mutation(
        "send before fsync",
        "a cohort's replies before its release",
        _CLIENT,
        "        self.ledger.release(self._round, self._payloads)\n",
        "",
        _T_CLIENT,
    ),
    Mutation(
        "send before fsync",
        "replies before the commit",
        "federated/grid.py",
        "            self._transaction.commit()\n        while",
        "            pass\n        while",
        ("test_grid.py",),
    ),
    Mutation(
        "send before fsync",
        "a cohort's replies before its commit",
        "federated/grid.py",
        "            self._transaction.commit()\n        return joint",
        "            pass\n        return joint",
        ("test_cohort_steps.py",),
    ),
    Mutation(
        "send before fsync",
        "each reply as soon as it is made",
        "federated/grid.py",
        "if self._transaction is None or self._transaction.commit_if_much():",
        "if self._transaction is None or not self._transaction.commit_if_much():",
        ("test_grid.py",),
    ),
    Mutation(
        "send before fsync",
        "a large reply before its release",
        _CLIENT,
        "        self._settle()\n        return True\n",
        "        return True\n",
        _T_CLIENT,
    ),
    Mutation(
        "send before fsync",
        "a server's model before its release",
        _COHORTS,
        "            self.ledger.release(round_number, {self.turn.key: save(dict(release))})\n",
        "            save(dict(release))\n",
        _T_COHORTS,
    ),
    Mutation(
        "send before fsync",
        "a cohort before its charge",
        _COHORTS,
        '        self._charge = self._reserve(self.mechanism, server_round, config, self._weights, "")\n',
        "        early = self.mechanism.draw_cohort(clients, self.randomness(server_round))\n"
        '        self._charge = self._reserve(self.mechanism, server_round, config, self._weights, "")\n',
        _T_COHORTS,
    ),
    Mutation(
        "send before fsync",
        "an evaluation's cohort before its charge",
        _COHORTS,
        '        self._charge = self._reserve(mechanism, server_round, config, from_record(arrays), "evaluate\\n")\n',
        "        early = "
        + _DRAWN_TO_EVALUATE
        + '        self._charge = self._reserve(mechanism, server_round, config, from_record(arrays), "evaluate\\n")\n',
        _T_COHORTS,
    ),
    Mutation(
        "send before fsync",
        "a sum before its release",
        _FEDERATION,
        "    gate.commit()\n",
        "",
        _T_DATA,
    ),
]

_TWO_C = [
    Mutation(
        "C where 2C is due",
        "local, float",
        _MECHANISM,
        "_add_noise_to_arrays(clipped, 2.0 * self",
        "_add_noise_to_arrays(clipped, 1.0 * self",
        _WHOLE_UPDATE,
    ),
    Mutation(
        "C where 2C is due",
        "local, grid",
        _MECHANISM,
        "row, doubled = _row(update), 2.0 * self.noise_multiplier",
        "row, doubled = _row(update), 1.0 * self.noise_multiplier",
        _WHOLE_UPDATE,
    ),
]

_TWO_C += [
    Mutation(
        "C where 2C is due",
        "client, bits that are not shifted to ±½",
        _CLIPPING,
        "        shifted = unclipped - replies / 2.0 ",
        "        shifted = unclipped - self.expected_cohort / 2.0 ",
        _T_CLIPPING,
    ),
]

_TRUNCATED = [
    Mutation(
        "a truncated batch",
        "record, gradients from hooks",
        _GRADIENTS,
        "        for start in range(0, len(batch), self._chunk):\n",
        "        for start in range(0, min(len(batch), self._chunk), self._chunk):\n",
        _T_TRAIN,
    ),
    Mutation(
        "a truncated batch",
        "record, sums of the fast step",
        _SUMS,
        "        for start in range(0, len(inputs), size):\n",
        "        for start in range(0, min(len(inputs), size), size):\n",
        _T_SUMS,
    ),
    Mutation(
        "a truncated batch",
        "record, a sum over records",
        _STATISTIC,
        "    for start in range(0, len(records), _CHUNK):\n",
        "    for start in range(0, min(len(records), _CHUNK), _CHUNK):\n",
        _T_EVALUATION,
    ),
    Mutation(
        "a truncated batch",
        "grid",
        _GRID,
        "        for start in range(0, len(vectors), rows):\n",
        "        for start in range(0, min(len(vectors), rows), rows):\n",
        _T_GRID,
    ),
    Mutation(
        "a truncated batch",
        "record, the sampler",
        _MECHANISM,
        "np.flatnonzero(randomness.bernoulli(size, self.sample_rate))\n",
        "np.flatnonzero(randomness.bernoulli(size, self.sample_rate))[: round(2 * size * self.sample_rate) + 2]\n",
        _ALL_COINS,
    ),
    Mutation(
        "a truncated batch",
        "client, the sampler",
        _MECHANISM,
        "        return [client for client, coin in zip(clients, coins, strict=True) if coin]\n",
        "        drawn = [client for client, coin in zip(clients, coins, strict=True) if coin]\n"
        "        return drawn[: round(1.5 * len(clients) * self.sample_rate) + 1]\n",
        _ALL_COINS,
    ),
]

_HEAD = [
    Mutation(
        "an un-noised head",
        "record, sums of the fast step",
        _GRADIENTS,
        _FAST_STEP,
        _FAST_STEP.replace("return ", "noised = ")
        + "        return [*noised[:-1], adder.split(total)[-1] / mechanism.normaliser]\n",
        _T_TRAIN,
    ),
    Mutation(
        "an un-noised head",
        "record, gradients from hooks",
        _GRADIENTS,
        _SLOW_STEP,
        "            chunks = list(self._gradients(batch))\n"
        f"            clean = {_TWIN}.noisy_mean(chunks, shapes, randomness)\n"
        "            return [*mechanism.noisy_mean(chunks, shapes, randomness)[:-1], clean[-1]]\n",
        _T_TRAIN,
    ),
    Mutation(
        "an un-noised head",
        "record, float",
        _MECHANISM,
        _RECORD_NOISE,
        "            noised = _add_noise(total, self.noise_multiplier * self.max_grad_norm, randomness)\n"
        "            total = [*noised[:-1], total[-1]] if len(total) > 1 else noised\n",
        _EVERY_NUMBER,
    ),
    Mutation(
        "an un-noised head",
        "record, grid",
        _MECHANISM,
        _GRID_MEAN,
        "        chunks = [list(chunk) for chunk in chunks]\n"
        + _GRID_MEAN.replace("        return ", "        found = ")
        + "        clean = [clipped_sum(chunk, self.max_grad_norm)[-1] for chunk in chunks]\n"
        "        return [*found[:-1], sum(clean, start=torch.zeros(shapes[-1])) / self.normaliser]\n",
        _EVERY_NUMBER,
    ),
    Mutation(
        "an un-noised head",
        "client and local",
        _MECHANISM,
        "    return {name: np.asarray(array + pieces[name]) for name, array in arrays.items()}\n",
        "    head = list(arrays)[-1]\n"
        "    pieces[head] = pieces[head] * (len(arrays) == 1)\n"
        "    return {name: np.asarray(array + pieces[name]) for name, array in arrays.items()}\n",
        _LEARNED_CLIP,
    ),
    Mutation(
        "an un-noised head",
        "record, trained beside the step",
        _TRAIN,
        "        self._steps.take(steps)\n",
        "        if private and len(batch):\n"
        "            steps = [*steps[:-1], gradients.plain(batch)[-1]]\n"
        "        self._steps.take(steps)\n",
        _T_TRAIN,
    ),
]

_TEXT = [
    Mutation(
        "exception text leaving",
        "record and local",
        _CLIENT,
        "    except Exception:  # noqa: BLE001  # whatever happened, its text stays on the owner's disk\n"
        "        note_error(owner.log)\n"
        '        return _refusal(message, "unavailable")\n',
        "    except Exception as error:\n        note_error(owner.log)\n        return _refusal(message, str(error))\n",
        _T_CLIENT,
    ),
    Mutation(
        "exception text leaving",
        "client",
        _CLIENT,
        "    except Exception:  # noqa: BLE001  # a client's trouble is its own: it contributes zero\n"
        "        note_error(owner.log)\n"
        '        return _refusal(message, "unavailable")\n',
        "    except Exception as error:\n        note_error(owner.log)\n        return _refusal(message, str(error))\n",
        _MEMBER,
    ),
    Mutation(
        "exception text leaving",
        "client, nothing caught",
        _CLIENT,
        "    try:\n        return answer()\n    except Exception:  # noqa: BLE001",
        "    try:\n        return answer()\n    except ImportError:  # noqa: BLE001",
        _MEMBER,
    ),
    Mutation(
        "exception text leaving",
        "finding the owner",
        _CLIENT,
        '        _LOG.error("no owner for this node: %s", type(error).__name__)\n        return None\n',
        "        raise\n",
        _FINDER,
    ),
    Mutation(
        "exception text leaving",
        "finding the owner, in the log",
        _CLIENT,
        '_LOG.error("no owner for this node: %s", type(error).__name__)',
        '_LOG.error("no owner for this node: %s", error)',
        _FINDER,
    ),
    Mutation(
        "exception text leaving",
        "the shared log of a process",
        _OWNER,
        "    with contextlib.suppress(OSError):  # a full disk",
        '    __import__("logging").getLogger("tacit").error(traceback.format_exc())\n'
        "    with contextlib.suppress(OSError):  # a full disk",
        _CANARY,
    ),
    Mutation(
        "exception text leaving",
        "a sum",
        _FEDERATION,
        "    except Exception:  # noqa: BLE001  # its text may hold a record's values\n",
        "    except ImportError:  # noqa: BLE001  # its text may hold a record's values\n",
        _T_DATA,
    ),
    Mutation(
        "exception text leaving",
        "client, a sum",
        _FEDERATION,
        "    except Exception:  # noqa: BLE001  # a client's trouble is its own: it contributes zero\n",
        "    except ImportError:  # noqa: BLE001  # a client's trouble is its own: it contributes zero\n",
        _T_DATA,
    ),
    Mutation(
        "exception text leaving",
        "client, where everybody reads",
        "edge/composition.py",
        '    return private if mechanism.unit == "client" else folder / f"owners/{name}/errors.log"\n',
        '    return folder / f"owners/{name}/errors.log"\n',
        ("test_server_app.py::test_a_failing_owners_text_is_where_only_its_keeper_reads_it",),
    ),
]

_BESIDES = [
    Mutation(
        BESIDES,
        "an exception is not a failure, so it is tried until it works",
        _OWNER,
        "    except Exception:\n        gate.fail(request)\n        raise\n",
        "    except Exception:\n        raise\n",
        _T_CLIENT,
    ),
    Mutation(
        BESIDES,
        "a failed key is computed again",
        _LEDGER,
        "        if key in self._closed:\n            digest = self._closed[key]\n",
        "        if self._closed.get(key):\n            digest = self._closed[key]\n",
        _T_LEDGER,
    ),
    Mutation(
        BESIDES,
        "the divisor is the batch's own size",
        _GRADIENTS,
        _FAST_STEP,
        _FAST_STEP.replace("adder.split(", "adder.split(mechanism.normaliser / max(1, len(batch)) * "),
        _T_TRAIN,
    ),
    Mutation(
        BESIDES,
        "the divisor is the cohort's own size",
        _MECHANISM,
        "        total = {name: np.zeros(array.shape) for name, array in like.items()}\n"
        "        for update in updates:\n",
        "        total = {name: np.zeros(array.shape) for name, array in like.items()}\n"
        "        updates = [{n: a * (self.normaliser / max(1, len(updates))) for n, a in u.items()} for u in updates]\n"
        "        for update in updates:\n",
        _T_COHORTS,
    ),
    Mutation(
        BESIDES,
        "a reservation reopens for ever",
        _LEDGER,
        "self._open[key] >= _MOST_REOPENS",
        "self._open[key] >= 1000",
        _T_LEDGER,
    ),
    Mutation(
        BESIDES,
        "a payload is replayed by its key alone",
        "federated/outbox.py",
        "            if hashlib.sha256(payload).hexdigest() == digest:\n",
        "            if digest:\n",
        ("test_outbox.py",),
    ),
    Mutation(
        BESIDES,
        "charges of one write do not count against each other",
        _LEDGER,
        "history = merge([*charged.get(name, account.history).items(), cost(draft)])",
        "history = merge([*account.history.items(), cost(draft)])",
        _T_LEDGER,
    ),
    Mutation(
        BESIDES,
        "an owner's own rate at the noise of another",
        "edge/planning.py",
        "own if not mechanism.private else replace(_with_noise(recipe, silent), void=mechanism.void)\n",
        "own\n",
        ("test_sizes.py::test_each_owner_keeps_the_same_budget_at_its_own_rate",),
    ),
    Mutation(
        BESIDES,
        "an owner tells how many records it holds",
        _CLIENT,
        '        "num-examples": 1,\n',
        '        "num-examples": len(owner.records()),\n',
        _T_CLIENT,
    ),
    Mutation(
        BESIDES,
        "a server that asks for a loss on records gets it",
        _CLIENT,
        "        return None if owner.mechanism.private and wants_loss(message) else owner.mechanism\n",
        "        return owner.mechanism\n",
        _T_CLIENT,
    ),
    Mutation(
        "send before fsync",
        "owners whose steps were taken at once",
        "federated/together.py",
        "                self._grants.release(request, save(cohort.unfold(row)))\n",
        "                pass\n",
        ("test_cohort_steps.py::test_what_a_cohort_releases_is_charged_before_and_on_disk_for_each_owner",),
    ),
    Mutation(
        "no noise",
        "owners whose steps are taken at once",
        "federated/cohort.py",
        "return _noised(total.cpu(), walks).to(self._device) if mechanism.per_record else total",
        "return total / mechanism.normaliser if mechanism.per_record else total",
        ("test_cohort_steps.py",),
    ),
    Mutation(
        "reused seed",
        "one row of noise for all owners whose steps are taken at once",
        "federated/cohort.py",
        "        blocks = first.mechanism.noised(list(torch.split(total.flatten(), _NOISE_BLOCK)), first.randomness)\n"
        "        return torch.cat(blocks).view_as(total)\n",
        "        noise = first.mechanism.noised([torch.zeros_like(total[0])], first.randomness)[0]\n"
        "        return total / first.mechanism.normaliser + noise\n",
        ("test_cohort_steps.py",),
    ),
    Mutation(
        "a NaN record",
        "owners whose steps are taken at once, sums from the norms' parts",
        "federated/stacked_model.py",
        "        mask = None if bool(usable.all()) else usable\n",
        "        mask = None\n",
        ("test_cohort_steps.py",),
    ),
    Mutation(
        "a NaN record",
        "owners whose steps are taken at once",
        "federated/stacked_model.py",
        "        if not bool((usable | ~present).all()):\n",
        "        if False:\n",
        ("test_cohort_steps.py",),
    ),
    Mutation(
        "a NaN record",
        "owners whose steps are taken at once, a neighbour masked instead",
        "federated/stacked_model.py",
        "            fine = order.apart(usable)\n",
        "            fine = usable.view_as(there)\n",
        ("test_cohort_steps.py",),
    ),
    Mutation(
        "per-layer clip for flat",
        "owners whose steps are taken at once, layers before an activation in place",
        "federated/stacked_model.py",
        "    if out._is_view():",
        "    if False:",
        ("test_cohort_steps.py",),
    ),
    Mutation(
        "a truncated batch",
        "owners whose steps are taken at once, in pieces",
        "federated/cohort_passes.py",
        "        for start in range(0, self.there.shape[1], width):\n",
        "        for start in range(0, min(width, self.there.shape[1]), width):\n",
        ("test_cohort_passes.py",),
    ),
    Mutation(
        "a truncated batch",
        "owners whose steps are taken at once, filled up to too little",
        "federated/cohort_passes.py",
        "            places[row, : len(chosen)] = chosen\n            there[row, : len(chosen)] = True\n",
        "            places[row, : len(chosen)] = chosen[:width]\n            there[row, : len(chosen) - 1] = True\n",
        ("test_cohort_passes.py",),
    ),
    Mutation(
        "per-layer clip for flat",
        "owners whose steps are taken at once",
        "federated/stacked_model.py",
        "            norms = norm_from_above(parts, records=records, parameters=self.size)\n",
        "            norms = norm_from_above(parts[:1], records=records, parameters=self.size)\n",
        ("test_cohort_steps.py",),
    ),
    Mutation(
        BESIDES,
        "records are counted with a model of the owner's own that has no noise",
        _CLIENT,
        '        own = owner.mechanism.unit != "record"\n',
        "        own = True\n",
        ("test_personal.py",),
    ),
    Mutation(
        BESIDES,
        "parameters that stay are sent as well",
        "federated/personal.py",
        "            return {name: after[name] for name in before}, {}\n",
        "            return dict(after), {}\n",
        ("test_personal.py",),
    ),
    Mutation(
        BESIDES,
        "unit local: what was computed is sent as it is",
        _TRAIN,
        "            return {**after, **_moved(arrays, self",
        "            return after or {**after, **_moved(arrays, self",
        _WHOLE_UPDATE,
    ),
    Mutation(
        BESIDES,
        "Ditto's own model is where the shared one goes on",
        "federated/personal.py",
        '            kept |= {f"personal.{name}": array for name, array in moved.items()}\n',
        '            kept |= {f"personal.{name}": array for name, array in moved.items()}\n            after = moved\n',
        ("test_personal.py",),
    ),
]

MUTATIONS = (
    *_NO_NOISE,
    *_HALF_NOISE,
    *_NOISE_WITHOUT_C,
    *_CLIP_AFTER,
    *_PER_LAYER,
    *_REUSED_SEED,
    *_FIXED_SIZE,
    *_SEEDED_SAMPLER,
    *_FORK,
    *_NAN,
    *_NO_DIMENSION,
    *_ORDER,
    *_TWO_C,
    *_TRUNCATED,
    *_HEAD,
    *_TEXT,
    *_BESIDES,
)
