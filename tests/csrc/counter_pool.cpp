// The pool of counters with a device, streams and graphs that are made up, for
// test_counter_pool.py: `counter_pool CASE` says what is wrong, or nothing.

#include "bindings/cuda/counter_pool.h"

#include <atomic>
#include <cstdio>
#include <cstring>
#include <functional>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace qkernels::bindings {
namespace {

#define EXPECT(condition)                                                                 \
  do {                                                                                    \
    if (!(condition)) throw std::logic_error(std::to_string(__LINE__) + ": " #condition); \
  } while (false)

class Device final : public CounterDevice<int> {
 public:
  uint32_t* allocate(int device, int64_t count) override {
    if (fails_to_allocate) throw std::runtime_error("no memory");
    blocks.emplace_back(static_cast<size_t>(count));
    devices.push_back(device);
    if (during_allocation) during_allocation();
    return blocks.back().data();
  }

  void when_gone(int graph, void (*released)(void*), void* data) override {
    if (fails_to_retain) throw std::runtime_error("no object");
    const std::lock_guard<std::mutex> lock(mutex);
    objects.insert({graph, {released, data}});
  }

  // The last launch of the graph has ended, and nobody holds it.
  void destroy(int graph) {
    std::vector<std::pair<void (*)(void*), void*>> ended;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      const auto [first, last] = objects.equal_range(graph);
      for (auto at = first; at != last; ++at) ended.push_back(at->second);
      objects.erase(first, last);
    }
    for (const auto& [released, data] : ended) released(data);
  }

  std::list<std::vector<uint32_t>> blocks;
  std::vector<int> devices;
  std::mutex mutex;
  std::multimap<int, std::pair<void (*)(void*), void*>> objects;
  bool fails_to_allocate = false, fails_to_retain = false;
  std::function<void()> during_allocation;
};

struct World {
  Device device;
  CounterPool<int> pool{device};

  uint32_t* eager(uint64_t stream, int64_t count = 10, int on = 0) {
    return pool.counters({on, stream, 0}, 0, count);
  }
  // The graph has the number of its capture.
  uint32_t* captured(uint64_t stream, int capture, int64_t count = 10) {
    return pool.counters({0, stream, static_cast<uint64_t>(capture)}, capture, count);
  }
  ~World() {
    while (!device.objects.empty()) device.destroy(device.objects.begin()->first);
  }
};

void streams_never_share() {
  World w;
  const std::set<uint32_t*> all = {w.eager(1), w.eager(2), w.eager(3), w.eager(1, 10, 1)};
  EXPECT(all.size() == 4);
  EXPECT((w.device.devices == std::vector<int>{0, 0, 0, 1}));
  EXPECT(w.eager(1) != w.eager(2));
}

void a_stream_keeps_its_own() {
  World w;
  uint32_t* const first = w.eager(1);
  EXPECT(w.eager(1, 1000) == first && w.eager(1, 1) == first);
  EXPECT(w.device.blocks.size() == 1);
}

void a_larger_piece_takes_the_place_of_a_smaller_one() {
  World w;
  uint32_t* const small = w.eager(1, 1024);
  uint32_t* const large = w.eager(1, 1025);
  EXPECT(small != large && w.device.blocks.back().size() >= 1025);
  EXPECT(w.eager(1, 1) == large && w.eager(1, 2048) == large);
  // What was started with the small one may be running.
  EXPECT(w.eager(2, 1024) != small);
  EXPECT(w.device.blocks.size() == 3);
}

void captures_never_share() {
  World w;
  uint32_t* const stream = w.eager(1);
  uint32_t* const first = w.captured(1, 7);
  uint32_t* const second = w.captured(1, 8);
  uint32_t* const fork = w.captured(2, 8);
  EXPECT((std::set<uint32_t*>{stream, first, second, fork}.size() == 4));
  EXPECT(w.captured(1, 7) == first && w.captured(1, 8) == second && w.captured(2, 8) == fork);
  EXPECT(w.eager(1) == stream);
  EXPECT(w.device.objects.size() == 3);
}

void a_graph_that_is_gone_gives_all_back() {
  World w;
  std::set<uint32_t*> had = {w.captured(1, 7), w.captured(1, 7, 5000), w.captured(2, 7)};
  EXPECT(had.size() == 3 && w.device.objects.size() == 2);
  EXPECT(had.count(w.captured(1, 8)) == 0);
  const size_t blocks = w.device.blocks.size();
  w.device.destroy(7);
  // A piece of each size that it had, and then new ones.
  EXPECT(had.count(w.captured(3, 9)) == 1 && had.count(w.captured(4, 9)) == 1);
  EXPECT(had.count(w.eager(5, 5000)) == 1);
  EXPECT(w.device.blocks.size() == blocks);
  EXPECT(had.count(w.captured(6, 9)) == 0);
  EXPECT(w.device.blocks.size() == blocks + 1);
}

void a_graph_keeps_its_own_while_others_end() {
  World w;
  w.captured(1, 7);
  uint32_t* const kept = w.captured(1, 8);
  w.device.destroy(7);
  for (uint64_t stream = 10; stream < 20; ++stream) EXPECT(w.eager(stream) != kept);
  EXPECT(w.captured(1, 8) == kept);
}

void devices_never_share() {
  World w;
  uint32_t* const first = w.captured(1, 7);
  w.device.destroy(7);
  EXPECT(w.eager(2, 10, 1) != first);
  EXPECT(w.eager(2) == first);
}

void no_memory_changes_nothing() {
  World w;
  uint32_t* const small = w.eager(1);
  w.device.fails_to_allocate = true;
  for (const auto& call : std::vector<std::function<void()>>{
           [&] { w.eager(1, 5000); }, [&] { w.eager(2); }, [&] { w.captured(1, 7); }}) {
    std::string error;
    try {
      call();
    } catch (const std::runtime_error& caught) {
      error = caught.what();
    }
    EXPECT(error == "no memory");
  }
  EXPECT(w.eager(1) == small && w.device.objects.empty());
  w.device.fails_to_allocate = false;
  EXPECT(w.eager(1, 5000) != small && w.eager(2) != small && w.captured(1, 7) != small);
  EXPECT(w.device.blocks.size() == 4 && w.device.objects.size() == 1);
}

void a_graph_that_takes_no_object_gets_nothing() {
  World w;
  w.device.fails_to_retain = true;
  bool failed = false;
  try {
    w.captured(1, 7);
  } catch (const std::runtime_error&) {
    failed = true;
  }
  EXPECT(failed && w.device.blocks.size() == 1);
  // The memory is there for whoever asks next, and its user is not taken for a borrower.
  w.device.fails_to_retain = false;
  EXPECT(w.captured(1, 7) == w.device.blocks.front().data());
  EXPECT(w.device.objects.size() == 1 && w.device.blocks.size() == 1);
}

// CUDA may end a graph, on this thread or another one, while it allocates.
void a_graph_ends_during_an_allocation() {
  World w;
  uint32_t* const first = w.captured(1, 7);
  w.device.during_allocation = [&] { w.device.destroy(7); };
  EXPECT(w.eager(2) != first);
  w.captured(1, 8, 5000);
  w.device.during_allocation = [&] { std::thread([&] { w.device.destroy(8); }).join(); };
  w.eager(3, 5000);
  w.device.during_allocation = nullptr;
  EXPECT(w.eager(4) == first && w.device.blocks.size() == 4);
}

// Every thread takes, checks that nobody else counts with what it has, and gives back.
void many_threads() {
  World w;
  std::atomic<int> captures{0};
  std::vector<std::string> problems(4);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < problems.size(); ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 200; ++i) {
        const int capture = ++captures;
        uint32_t* const own = w.captured(t, capture, 1 + i * 20);
        uint32_t* const eager = w.eager(t, 1 + i * 20);
        for (uint32_t* counter : {own, eager}) {
          if (++*counter != 1) problems[t] = "another thread counts with the same counters";
        }
        std::this_thread::yield();
        for (uint32_t* counter : {own, eager}) {
          if (--*counter != 0) problems[t] = "another thread counted with the same counters";
        }
        w.device.destroy(capture);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& problem : problems) EXPECT(problem.empty());
  // Four sizes; at most one of each for a thread's stream and two for its graphs.
  EXPECT(w.device.blocks.size() <= 4 * 3 * problems.size());
}

struct Case {
  const char* name;
  void (*run)();
};

#define CASE(name) {#name, name}
constexpr Case kCases[] = {
    CASE(streams_never_share),
    CASE(a_stream_keeps_its_own),
    CASE(a_larger_piece_takes_the_place_of_a_smaller_one),
    CASE(captures_never_share),
    CASE(a_graph_that_is_gone_gives_all_back),
    CASE(a_graph_keeps_its_own_while_others_end),
    CASE(devices_never_share),
    CASE(no_memory_changes_nothing),
    CASE(a_graph_that_takes_no_object_gets_nothing),
    CASE(a_graph_ends_during_an_allocation),
    CASE(many_threads),
};

int run(const char* name) {
  for (const Case& each : kCases) {
    if (std::strcmp(each.name, name) != 0) continue;
    try {
      each.run();
    } catch (const std::logic_error& problem) {
      std::fprintf(stderr, "%s\n", problem.what());
      return 1;
    }
    return 0;
  }
  std::fprintf(stderr, "no case %s\n", name);
  return 2;
}

}  // namespace
}  // namespace qkernels::bindings

int main(int argc, char** argv) { return argc == 2 ? qkernels::bindings::run(argv[1]) : 2; }
