"""Run on every rank by test_generate_on_ranks.py: hot sampling without a seed must give all ranks the same tokens."""

import sys

from unisparse_np.attention import load_backend
from unisparse_np.model.generate import stream_generate
from unisparse_np.model.loading import load
from unisparse_np.parallel import arrange, world

ranks = arrange(world(), 1, load_backend("reference"))
model, tokenizer = load(sys.argv[1], backend="reference", ranks=ranks)
drawn = [piece.token_id for piece in stream_generate(model, tokenizer, "The number is", temperature=5.0, max_tokens=12, raw=True)]
everyone = ranks.world.gather_values(drawn)
assert len(drawn) > 1 and all(other == drawn for other in everyone), everyone
if ranks.world.rank == 0:
    print("all ranks drew", *drawn)
