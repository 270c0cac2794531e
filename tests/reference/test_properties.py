"""ALGORITHM.md's "Consequences worth testing", each as a property over random problems, and the oracle's second opinion."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import oracle
from tests.problems import problems
from unisparse_np import KeySummary, Problem, UniSparseConfig, reference, unisparse_attention
from unisparse_np.comparison import TOLERANCES

EXACT = TOLERANCES["float64"]
few = settings(max_examples=60, deadline=None)


def make_problem(q, k, config, keywords):
    return Problem(q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2], config, **keywords)


def scores_of(q, k, problem):
    return reference.score_blocks(*reference.compress(q, k, problem), problem)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=EXACT.output)


@few
@given(problems())
def test_agrees_with_the_oracle(case):
    q, k, v, config, keywords = case
    out, trace = unisparse_attention(q, k, v, config, return_trace=True, **keywords)
    expected = oracle(q, k, v, config, **keywords)
    close(trace.mean, expected["mean"])
    if config.row_threshold is not None:
        close(trace.peak, expected["peak"])
    np.testing.assert_array_equal(trace.mask, expected["mask"])
    close(out, expected["out"])
    close(trace.lse, expected["lse"])


@few
@given(problems(rules="top_p", top_p=1.0))
def test_p_of_one_is_dense_whatever_the_anchors(case):
    q, k, v, config, keywords = case
    out, lse, trace = unisparse_attention(q, k, v, config, return_lse=True, return_trace=True, **keywords)
    dense_out, dense_lse, dense = unisparse_attention(q, k, v, "dense", return_lse=True, return_trace=True, **keywords)
    assert trace.density == 1.0 and dense.density == 1.0
    close(out, dense_out)
    close(lse, dense_lse)


@few
@given(problems())
def test_rows_of_the_scores_sum_to_one(case):
    q, k, _, config, keywords = case
    problem = make_problem(q, k, config, keywords)
    qc, kc = reference.compress(q, k, problem)
    mean, peak = reference.score_blocks(qc, kc, problem)
    close(mean.sum(axis=-1), 1.0)
    for i in range(problem.num_q_blocks):
        close(reference.scores.compressed_attention(qc, kc, i, problem).sum(axis=-1), 1.0)
    if peak is not None:
        assert (peak <= 1 + EXACT.scores).all()
        assert config.top_p_compress is not None or (peak >= mean - EXACT.scores).all()


@few
@given(problems(rules="top_p"))
def test_top_p_prefix_reaches_p_and_not_without_its_last_block(case):
    q, k, _, config, keywords = case
    problem = make_problem(q, k, config, keywords)
    mean, _ = scores_of(q, k, problem)
    kept = reference.select.top_p_prefix(mean, reference.select.visible_blocks(problem), config.top_p)
    if config.top_p == 1.0:
        np.testing.assert_array_equal(kept, np.broadcast_to(reference.select.visible_blocks(problem), kept.shape))
        return
    mass = np.where(kept, mean, 0.0).sum(axis=-1)
    smallest = np.where(kept, mean, np.inf).min(axis=-1)
    assert (mass >= config.top_p - EXACT.scores).all()
    assert (mass - smallest < config.top_p + EXACT.scores).all()


@few
@given(problems(rules="top_p"), st.sampled_from([(0.1, 0.3), (0.5, 0.7), (0.9, 0.99), (0.99, 1.0)]))
def test_growing_p_only_adds_blocks(case, shares):
    q, k, _, config, keywords = case
    problem = make_problem(q, k, config, keywords)
    mean, peak = scores_of(q, k, problem)
    small, large = (reference.select_blocks(mean, peak, replace(problem, config=replace(config, top_p=p))) for p in shares)
    assert not (small & ~large).any()


@few
@given(problems(rules="row"), st.sampled_from([(0.02, 0.01), (0.3, 0.1), (0.9, 0.5)]))
def test_lowering_the_row_threshold_only_adds_blocks_and_what_it_drops_is_small(case, thresholds):
    q, k, _, config, keywords = case
    problem = make_problem(q, k, replace(config, row_threshold=thresholds[0]), keywords)
    qc, kc = reference.compress(q, k, problem)
    mean, peak = reference.score_blocks(qc, kc, problem)
    high, low = (reference.select_blocks(mean, peak, replace(problem, config=replace(config, row_threshold=tau))) for tau in thresholds)
    assert not (high & ~low).any()
    dropped = ~high[:: config.head_compress]  # [Hc, Nq, Nk]
    for i in range(problem.num_q_blocks):
        mass = reference.scores.sum_per_block(reference.scores.compressed_attention(qc, kc, i, problem), problem)
        assert (np.where(dropped[:, i, None, : mass.shape[-1]], mass, 0.0) <= thresholds[0]).all()


@few
@given(problems(q_compress=1, k_compress=1, head_compress=1, top_p_compress=None))
def test_without_compression_the_scores_are_the_true_block_masses(case):
    q, k, _, config, keywords = case
    problem = make_problem(q, k, config, keywords)
    mean, _ = scores_of(q, k, problem)
    starts = np.arange(0, problem.k_len, config.block_size)
    for head in range(problem.num_q_heads):
        logits = q[head] @ k[head // problem.group_size].T * problem.scale  # [Lq, Lk]
        if problem.causal:
            logits[np.arange(problem.k_len) > problem.q_offset + np.arange(problem.q_len)[:, None]] = -np.inf
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        masses = np.add.reduceat(weights / weights.sum(axis=1, keepdims=True), starts, axis=1)  # [Lq, Nk]
        for i in range(problem.num_q_blocks):
            np.testing.assert_allclose(mean[head, i], masses[slice(*problem.query_range(i))].mean(axis=0), rtol=0, atol=EXACT.output)


@few
@given(problems(causal=True), st.integers(1, 3))
def test_masks_do_not_depend_on_the_chunking(case, blocks_per_chunk):
    """For identical q and k the masks of a prompt in block-aligned chunks are those of the whole, to the bit; anchors too."""
    q, k, v, config, keywords = case
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    whole, trace = unisparse_attention(q, k, v, config, return_trace=True, **keywords)
    offset, step = make_problem(q, k, config, keywords).q_offset, blocks_per_chunk * config.block_size
    for start in range(0, q.shape[1], step):
        stop = min(q.shape[1], start + step)
        seen = offset + stop if stop < q.shape[1] or keywords["q_offset"] is not None else k.shape[1]
        width = config.top_p_compress or config.k_compress
        seen = min(k.shape[1], -(-seen // width) * width)  # the composite key that holds the last position
        part, part_trace = unisparse_attention(
            q[:, start:stop], k[:, :seen], v[:, :seen], config, q_offset=offset + start, return_trace=True
        )
        first, last = start // config.block_size, -(-stop // config.block_size)
        blocks = part_trace.mask.shape[-1]
        np.testing.assert_array_equal(part_trace.mask, trace.mask[:, first:last, :blocks])
        np.testing.assert_array_equal(part_trace.mean, trace.mean[:, first:last, :blocks])
        if trace.peak is not None:
            np.testing.assert_array_equal(part_trace.peak, trace.peak[:, first:last, :blocks])
        complete = seen // config.block_size
        np.testing.assert_array_equal(part_trace.anchors[:, :complete], trace.anchors[:, :complete])
        np.testing.assert_allclose(part, whole[:, start:stop], rtol=0, atol=TOLERANCES["float32"].output)


@few
@given(problems(rules="both"))
def test_each_rule_reads_composite_tokens_of_its_own_size(case):
    """Top-P with top_p_compress decides as Top-P alone over means of so many tokens; the row threshold as without it."""
    q, k, _, config, keywords = case
    if config.top_p_compress is None:
        return
    problem = make_problem(q, k, config, keywords)
    composites = reference.compress(q, k, problem)
    for found, expected in zip(
        reference.coarse_composites(*composites, problem), reference.compress(q, k, problem.of_top_p()), strict=True
    ):
        close(found, expected)
    mean, peak = reference.score_blocks(*composites, problem)
    close(mean, scores_of(q, k, problem.of_top_p())[0])
    np.testing.assert_array_equal(peak, scores_of(q, k, replace(problem, config=replace(config, top_p_compress=None)))[1])
    by_rule = [reference.select_blocks(mean, peak, rule) for rule in (problem.of_top_p(), problem.of_row_threshold())]
    np.testing.assert_array_equal(reference.select_blocks(mean, peak, problem), by_rule[0] | by_rule[1])


@few
@given(problems(rules="both"))
def test_coarse_composites_of_the_same_size_change_nothing(case):
    q, k, _, config, keywords = case
    width = max(config.q_compress, config.k_compress)
    problem = make_problem(q, k, replace(config, q_compress=width, k_compress=width, top_p_compress=None), keywords)
    both = [scores_of(q, k, replace(problem, config=replace(problem.config, top_p_compress=c))) for c in (None, width)]
    for plain, coarse in zip(*both, strict=True):
        close(coarse, plain)


@few
@given(problems(), st.integers(0, 2**32 - 1))
def test_permuting_query_heads_of_a_group_permutes_the_result(case, seed):
    q, k, v, config, keywords = case
    group = q.shape[0] // k.shape[0]
    if config.head_compress != 1 and config.head_compress % group:
        config = replace(config, head_compress=1)
    rng = np.random.default_rng(seed)
    order = np.concatenate([g * group + rng.permutation(group) for g in range(k.shape[0])])
    out = unisparse_attention(q, k, v, config, **keywords)
    close(unisparse_attention(q[order], k, v, config, **keywords), out[order])


@few
@given(problems(), st.sampled_from([-2.0, 0.5, 3.0]))
def test_scaling_v_scales_the_output(case, factor):
    q, k, v, config, keywords = case
    close(unisparse_attention(q, k, factor * v, config, **keywords), factor * unisparse_attention(q, k, v, config, **keywords))


@few
@given(problems(causal=True))
def test_one_query_is_a_decode_step(case):
    """A chunk of one query gives what the last row of the same query block gives once selection is out of the way."""
    q, k, v, config, _ = case
    last = q[:, -1:]
    out, trace = unisparse_attention(last, k, v, config, return_trace=True)
    expected = oracle(last, k, v, config)
    np.testing.assert_array_equal(trace.mask, expected["mask"])
    close(out, expected["out"])


@few
@given(problems(), st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_keys_that_arrive_in_parts_summarise_to_the_same_bits(case, cuts):
    q, k, v, config, keywords = case
    k = k.astype(np.float32)
    running = reference.RunningKeySummary(config, q.shape[0], k.shape[0], k.shape[2], capacity=k.shape[1])
    start = 0
    for cut in [*cuts, k.shape[1]]:
        running.extend(k[:, start : start + cut])
        start = min(k.shape[1], start + cut)
    summary = running.summary()
    problem = make_problem(q, k, config, keywords)
    np.testing.assert_array_equal(summary.kc, reference.compress(q, k, problem)[1])
    np.testing.assert_array_equal(summary.anchors, reference.find_anchors(k, config.block_size, config.key_anchors))
    q32, v32 = q.astype(np.float32), v.astype(np.float32)
    with_summary = unisparse_attention(q32, k, v32, config, key_summary=KeySummary(*summary), **keywords)
    np.testing.assert_array_equal(with_summary, unisparse_attention(q32, k, v32, config, **keywords))


@few
@given(problems())
def test_a_batch_is_its_items(case):
    q, k, v, config, keywords = case
    rng = np.random.default_rng(0)
    batch = [np.stack([x, rng.permutation(x, axis=1), -x]) for x in (q, k, v)]
    out, lse, traces = unisparse_attention(*batch, config, return_lse=True, return_trace=True, **keywords)
    for n, item in enumerate(zip(*batch, strict=True)):
        alone, alone_lse, trace = unisparse_attention(*item, config, return_lse=True, return_trace=True, **keywords)
        np.testing.assert_array_equal(out[n], alone)
        np.testing.assert_array_equal(lse[n], alone_lse)
        np.testing.assert_array_equal(traces[n].mask, trace.mask)


@few
@given(problems(rules="both"))
def test_one_value_a_composite_head(case):
    q, k, v, config, keywords = case
    heads = q.shape[0] // config.head_compress
    shares = tuple(np.linspace(0.2, 1.0, heads))
    thresholds = tuple(np.linspace(0.05, 0.5, heads))
    mixed = replace(config, top_p=shares, row_threshold=thresholds)
    _, trace = unisparse_attention(q, k, v, mixed, return_trace=True, **keywords)
    for h in range(heads):
        single = replace(config, top_p=shares[h], row_threshold=thresholds[h])
        _, alone = unisparse_attention(q, k, v, single, return_trace=True, **keywords)
        rows = slice(h * config.head_compress, (h + 1) * config.head_compress)
        np.testing.assert_array_equal(trace.mask[rows], alone.mask[rows])


def test_ties_go_to_the_lower_block():
    """Equal keys everywhere: all blocks weigh the same, so the kept prefix is the first ones in index order."""
    config = UniSparseConfig.paper(top_p=0.5)
    config = replace(config, block_size=8, q_compress=4, k_compress=4)
    q, k, v = np.ones((1, 8, 4)), np.ones((1, 64, 4)), np.ones((1, 64, 4))
    _, trace = unisparse_attention(q, k, v, config, causal=False, return_trace=True)
    np.testing.assert_array_equal(trace.mask[0, 0], [True] * 4 + [False] * 4)


def test_anchor_ties_go_to_the_lower_position():
    k = np.ones((1, 20, 4), dtype=np.float32)
    k[0, 13] = 0.5
    np.testing.assert_array_equal(reference.find_anchors(k, 8, 2), [[[0, 1], [13, 8], [16, 17]]])


def test_a_ragged_block_shorter_than_r_gives_all_its_keys():
    k = np.arange(1.0, 10.0).reshape(1, 9, 1)
    np.testing.assert_array_equal(reference.find_anchors(k, 8, 3), [[[0, 1, 2], [8, -1, -1]]])
