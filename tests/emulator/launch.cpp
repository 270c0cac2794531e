// Runs one kernel of one source file on the CPU. Built as a shared library with -DSOURCE="file.cu" -DKERNEL=name.
#include "emulator.h"
#include SOURCE

#include <tuple>

static Action entry;
static void start() {
  entry();
  fibre->done = true;
  swapcontext(&fibre->context, &scheduler);
}

static void run_one_tma(Block& block) {
  const size_t n = random_bits() % block.tma.size();
  const Action action = block.tma[n];
  block.tma.erase(block.tma.begin() + n);
  action();
}

static void run_block(Dim index, int threads, size_t shared_bytes) {
  Block block;
  block.index = index;
  block.threads = threads;
  block.shared.assign(1024 + shared_bytes, (char)0xff);
  block.warps.resize((threads + 31) / 32);
  for (int t = 0; t < threads; ++t) {
    Fibre* f = new Fibre;
    f->thread = t;
    f->block = &block;
    f->stack = (char*)malloc(1 << 16);
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack;
    f->context.uc_stack.ss_size = 1 << 16;
    f->context.uc_link = nullptr;
    makecontext(&f->context, start, 0);
    block.fibres.push_back(f);
  }
  for (bool alive = true; alive;) {
    alive = false;
    bool progress = false;
    const int offset = random_bits() % threads;
    const bool backwards = random_bits() & 1;
    for (int i = 0; i < threads; ++i) {
      Fibre* f = block.fibres[((backwards ? threads - 1 - i : i) + offset) % threads];
      if (f->done) continue;
      alive = true;
      if (f->ready && !f->ready()) continue;
      progress = true;
      fibre = f;
      swapcontext(&scheduler, &f->context);
      if (!lazy_engine && !block.tma.empty() && random_bits() % 256 == 0) run_one_tma(block);
    }
    if (!block.tma.empty() && (!progress || (!lazy_engine && random_bits() % 4 == 0))) {
      run_one_tma(block);
      progress = true;
    }
    if (alive && !progress) fail("deadlock");
  }
  if (!block.tma.empty()) fail("a TMA load was never waited for");
  for (auto& b : block.barriers) if (b.second.bytes) fail("bytes announced that never came");
  for (Fibre* f : block.fibres) {
    for (auto& group : f->wgmma_groups) if (!group.empty()) fail("a wgmma was never waited for");
    free(f->stack);
    delete f;
  }
  operand_board.clear();
}

template <class... Parameters, size_t... I> static void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>) {
  kernel(*(std::remove_const_t<std::remove_reference_t<Parameters>>*)arguments[I]...);
}
template <class... Parameters> static void call(void (*kernel)(Parameters...), void** arguments, int given) {
  if (given >= 0 && given != (int)sizeof...(Parameters)) fail("wrong number of arguments");
  call(kernel, arguments, std::index_sequence_for<Parameters...>());
}

extern "C" void launch(void** arguments, int given, int grid_x, int grid_y, int threads, long shared_bytes, unsigned seed) {
  random_state = seed * 2654435761u + 1;
  lazy_engine = seed & 1;
  grid_size = {grid_x, grid_y, 1};
  block_size_ = {threads, 1, 1};
  entry = [=] { call(KERNEL, arguments, given); };
  for (int y = 0; y < grid_y; ++y)
    for (int x = 0; x < grid_x; ++x) run_block({x, y, 0}, threads, shared_bytes);
}

extern "C" int shared_bytes_of_source() {
#ifdef SHARED_BYTES
  return SHARED_BYTES;
#else
  return -1;
#endif
}
