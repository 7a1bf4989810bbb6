// Blocks of threads on the CPU: the schedule, barriers, exchanges between the lanes of a warp, and shared memory.
#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_pipeline_primitives.h"
#include "cuda_runtime.h"
#include "fibre.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_host {
namespace {

constexpr unsigned kWarp = 32;

enum class State { ready, at_barrier, exchanging, done };

struct Copy {
  void* to;
  const void* from;
  size_t bytes, zeros;
  size_t group;
};

// The asynchronous copies of a thread that are in flight, and the number of groups that it has ended.
struct Copies {
  std::vector<Copy> started = {};
  size_t groups = 0;
};

struct Thread {
  State state = State::ready;
  Fibre* fibre = nullptr;
  Place place{};  // where it waits
  Exchange exchange{};
  unsigned mask = 0, source = 0;
  uint64_t value = 0;  // what it passes to an exchange, then what it receives
  Copies copies = {};
};

// The order in which blocks and threads run: ascending (seed 0), descending (1) or random (2 and above).
class Schedule {
 public:
  // The seed is GLOW_KERNELS_SCHEDULE; if that is not set, every launch takes the next seed.
  Schedule() {
    static unsigned long launches = 0;
    const char* text = std::getenv("GLOW_KERNELS_SCHEDULE");
    seed_ = text ? std::strtoul(text, nullptr, 10) : launches++;
    random_.seed(static_cast<std::mt19937::result_type>(seed_));
  }
  void arrange(std::vector<unsigned>& order) {
    std::iota(order.begin(), order.end(), 0u);
    if (seed_ == 1) std::reverse(order.begin(), order.end());
    if (seed_ > 1) std::shuffle(order.begin(), order.end(), random_);
  }
  bool changes() const { return seed_ > 1; }
  unsigned long seed() const { return seed_; }

 private:
  unsigned long seed_;
  std::mt19937 random_;
};

class Block {
 public:
  Block(unsigned threads, size_t shared_bytes, const std::function<void()>& body)
      : body_(body), shared_bytes_(shared_bytes), threads_(threads), order_(threads) {}

  void run(Schedule& schedule);

  // These are called by the threads.
  void wait(Place place, State state) {
    Thread& thread = threads_[threadIdx.x];
    thread.place = place;
    thread.state = state;
    thread.fibre->pause();
  }
  uint64_t exchange(Place place, Exchange exchange, unsigned mask, uint64_t value, unsigned source) {
    Thread& thread = threads_[threadIdx.x];
    thread.exchange = exchange;
    thread.mask = mask;
    thread.value = value;
    thread.source = source;
    wait(place, State::exchanging);
    return thread.value;
  }
  void* shared_memory(const void* key, size_t bytes) {
    std::unique_ptr<char[]>& memory = shared_[key];
    if (!memory) {
      memory.reset(new char[bytes]);           // new aligns to 16 bytes
      std::memset(memory.get(), 0xff, bytes);  // NaN in every type
    }
    return memory.get();
  }
  size_t shared_bytes() const { return shared_bytes_; }
  Copies& copies() { return threads_[threadIdx.x].copies; }
  void start_copy(void* to, const void* from, size_t bytes, size_t zeros) {
    aligned_ = aligned_ && (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes == 0;
    copies().started.push_back({to, from, bytes, zeros, copies().groups});
  }

 private:
  void resume(unsigned index);
  void release_waiters(unsigned index);
  void finish_exchange(unsigned index);
  [[noreturn]] void report_deadlock() const;

  unsigned long seed_ = 0;
  const std::function<void()>& body_;
  size_t shared_bytes_;
  std::vector<Thread> threads_;
  std::vector<unsigned> order_;
  std::vector<Fibre*> idle_fibres_;  // fibres without a thread
  std::map<const void*, std::unique_ptr<char[]>> shared_;
  unsigned waiting_ = 0, done_ = 0;  // threads at a barrier, and those that have returned
  bool aligned_ = true;              // all copies so far
};

// TF32 ignores the low 13 bits.
float tf32(uint32_t bits) {
  float value;
  bits &= ~0x1fffu;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

std::mutex launch_mutex;
Block* running = nullptr;
std::vector<std::unique_ptr<Fibre>> fibres;

void Block::run(Schedule& schedule) {
  std::fill(threads_.begin(), threads_.end(), Thread{});
  shared_.clear();
  waiting_ = done_ = 0;
  idle_fibres_.clear();
  for (const auto& fibre : fibres) idle_fibres_.push_back(fibre.get());
  schedule.arrange(order_);
  seed_ = schedule.seed();
  running = this;
  while (done_ < threads_.size()) {
    bool progress = false;
    for (const unsigned index : order_) {
      if (threads_[index].state != State::ready) continue;
      progress = true;
      resume(index);
      if (!aligned_) throw std::runtime_error("a thread copies from or to an address that is not aligned");
      release_waiters(index);
    }
    if (!progress) report_deadlock();
    if (schedule.changes()) schedule.arrange(order_);
  }
}

void Block::resume(unsigned index) {
  Thread& thread = threads_[index];
  threadIdx = {index, 0, 0};
  if (thread.fibre != nullptr) return thread.fibre->resume();
  if (idle_fibres_.empty()) {
    fibres.push_back(std::make_unique<Fibre>());
    idle_fibres_.push_back(fibres.back().get());
  }
  thread.fibre = idle_fibres_.back();
  idle_fibres_.pop_back();
  thread.fibre->start(
      [](void* block) {
        auto* self = static_cast<Block*>(block);
        self->body_();
        self->threads_[threadIdx.x].state = State::done;
      },
      this);
}

// If the thread that has just paused was the last that others waited for, makes these ready.
void Block::release_waiters(unsigned index) {
  const State state = threads_[index].state;
  if (state == State::done) {
    idle_fibres_.push_back(threads_[index].fibre);
    ++done_;
  } else if (state == State::exchanging) {
    finish_exchange(index);
  } else if (state == State::at_barrier && ++waiting_ == threads_.size()) {
    const Place& first = threads_[0].place;
    for (Thread& thread : threads_) {
      if (thread.place.line != first.line || thread.place.file != first.file) report_deadlock();
    }
    for (Thread& thread : threads_) thread.state = State::ready;
    waiting_ = 0;
  }
}

void Block::finish_exchange(unsigned index) {
  const unsigned mask = threads_[index].mask, first = index / kWarp * kWarp;
  uint64_t values[kWarp] = {}, votes = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    const Thread& other = threads_[first + lane];
    const bool same = other.state == State::exchanging && other.exchange == threads_[index].exchange &&
                      other.mask == mask && other.place.line == threads_[index].place.line;
    if (!same) return;
    values[lane] = other.value;
    votes |= static_cast<uint64_t>(other.value != 0) << lane;
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    Thread& thread = threads_[first + lane];
    if (thread.exchange == Exchange::shuffle && (mask >> thread.source & 1) == 0) {
      throw std::runtime_error("a lane shuffles from a lane that is not in the mask");
    }
    thread.value = thread.exchange == Exchange::vote ? votes : values[thread.source];
    thread.state = State::ready;
  }
}

void Block::report_deadlock() const {
  std::ostringstream text;
  text << "block " << blockIdx.x << " of " << gridDim.x << " in layer " << blockIdx.y
       << " waits for ever (GLOW_KERNELS_SCHEDULE=" << seed_ << "):";
  // Has a line for every place where threads wait, with their number and the first of them.
  std::map<std::string, std::pair<unsigned, unsigned>> places;
  for (unsigned index = 0; index < threads_.size(); ++index) {
    const Thread& thread = threads_[index];
    std::ostringstream place;
    if (thread.state == State::done) {
      place << "returned";
    } else {
      place << (thread.state == State::at_barrier ? "at __syncthreads() in " : "for their warp in ")
            << thread.place.file << ':' << thread.place.line;
    }
    const auto added = places.emplace(place.str(), std::make_pair(index, 0u)).first;
    ++added->second.second;
  }
  for (const auto& [place, who] : places) {
    text << "\n  " << who.second << " threads, the first of them " << who.first << ", " << place;
  }
  throw std::runtime_error(text.str());
}

}  // namespace

void launch(unsigned blocks, unsigned layers, unsigned threads, size_t shared_bytes,
            const std::function<void()>& thread) {
  if (threads == 0 || threads % kWarp != 0 || threads > 1024) {
    throw std::runtime_error("a block has 32 to 1024 threads, a multiple of 32, not " + std::to_string(threads));
  }
  if (shared_bytes > static_cast<size_t>(max_shared_bytes())) {
    throw std::runtime_error("a block has at most " + std::to_string(max_shared_bytes()) + " bytes of shared memory");
  }
  const std::lock_guard<std::mutex> lock(launch_mutex);
  Schedule schedule;
  std::vector<unsigned> order(blocks * layers);
  schedule.arrange(order);
  gridDim = {blocks, layers, 1};
  blockDim = {threads, 1, 1};
  Block block(threads, shared_bytes, thread);
  for (const unsigned index : order) {
    blockIdx = {index % blocks, index / blocks, 0};
    block.run(schedule);
  }
}

int multiprocessors() {
  const char* text = std::getenv("GLOW_KERNELS_MULTIPROCESSORS");
  return text ? std::atoi(text) : 1;
}

int max_shared_bytes() {
  const char* text = std::getenv("GLOW_KERNELS_SHARED_BYTES");
  return text ? std::atoi(text) : 227 * 1024;
}

void* shared_memory(const void* key, size_t bytes) { return running->shared_memory(key, bytes); }
void* dynamic_shared() { return running->shared_memory(nullptr, running->shared_bytes()); }
void start_copy(void* to, const void* from, size_t bytes, size_t zeros) { running->start_copy(to, from, bytes, zeros); }
void end_group_of_copies() { ++running->copies().groups; }
void finish_copies(size_t left) {
  auto& [started, groups] = running->copies();
  const auto first_left =
      std::find_if(started.begin(), started.end(), [&](const Copy& copy) { return copy.group + left >= groups; });
  std::for_each(started.begin(), first_left, [](const Copy& copy) {
    const size_t read = copy.bytes - copy.zeros;
    std::memcpy(copy.to, copy.from, read);
    std::memset(static_cast<unsigned char*>(copy.to) + read, 0, copy.zeros);
  });
  started.erase(started.begin(), first_left);
}
void barrier(Place place) { running->wait(place, State::at_barrier); }
uint64_t exchange(Place place, Exchange exchange, unsigned mask, uint64_t value, unsigned source) {
  return running->exchange(place, exchange, mask, value, source);
}

// Fragments are laid out as in "Matrix Fragments for mma.m16n8k8" of the PTX ISA.
void multiply_add(Place place, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragments {
    const uint32_t *a, *b;
  };
  static Fragments all[1024];
  const unsigned warp = threadIdx.x / kWarp * kWarp, group = lane() / 4, quarter = lane() % 4;
  all[threadIdx.x] = {a, b};
  sync_warp(place);
  for (unsigned i = 0; i < 4; ++i) {
    double sum = c[i];
    for (unsigned k = 0; k < 8; ++k) {
      // Row group of A, or group + 8; column 2 quarter of B, or the next.
      const Fragments &row = all[warp + group * 4 + k % 4], &column = all[warp + (2 * quarter + i % 2) * 4 + k % 4];
      sum += static_cast<double>(tf32(row.a[i / 2 + k / 4 * 2])) * tf32(column.b[k / 4]);
    }
    c[i] = static_cast<float>(sum);
  }
  sync_warp(place);  // the fragments must stay valid until all lanes have read them
}

}  // namespace cuda_host
