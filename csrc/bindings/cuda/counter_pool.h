// Who may count with which words of a device's memory. Host logic alone: what it needs of CUDA
// stands behind CounterDevice.

#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <utility>

namespace qkernels::bindings {

// A stream, in which one kernel runs after another, and the graph that is being captured on it.
struct CounterUser {
  int device;
  uint64_t stream;   // a number that no other stream of the process ever has
  uint64_t capture;  // likewise of a capture; 0 where the kernel is started at once

  friend bool operator<(const CounterUser& a, const CounterUser& b) {
    return std::tie(a.device, a.stream, a.capture) < std::tie(b.device, b.stream, b.capture);
  }
};

// What the pool asks of a device. `Graph` is the graph that is being captured.
template <class Graph>
class CounterDevice {
 public:
  virtual ~CounterDevice() = default;

  // `count` zeros in memory of `device` that is never freed. Or throws.
  virtual uint32_t* allocate(int device, int64_t count) = 0;

  // Has `released(data)` called once, on any thread, when neither the graph nor anything that was
  // made from it exists or runs. Or throws, and leaves `data` to the caller.
  virtual void when_gone(Graph graph, void (*released)(void*), void* data) = 0;
};

// Counters of kernels, which find zeros and leave zeros. Two kernels that can run at the same time
// never get the same ones: a stream has its own, and so has each stream of a captured graph, whose
// kernels run wherever the graph is replayed. What a graph had is another one's after it is gone.
template <class Graph>
class CounterPool {
 public:
  explicit CounterPool(CounterDevice<Graph>& device) : device_(device) {}
  CounterPool(const CounterPool&) = delete;
  CounterPool& operator=(const CounterPool&) = delete;

  // `count` counters or more, which stay the user's: as long as the process runs, or as `graph`
  // exists, which is asked for where the user captures. Throws what the device throws, with nothing
  // changed but that memory may be left for the next call.
  uint32_t* counters(const CounterUser& user, Graph graph, int64_t count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    take_back();
    const auto known = users_.find(user);
    if (known != users_.end() && known->second.pieces.front().count >= count) {
      return known->second.pieces.front().counters;
    }
    int64_t size = kLeastCount;
    while (size < count) size *= 2;
    Pieces& free = free_[{user.device, size}];
    if (free.empty()) {
      Pieces made(1);
      made.front() = {device_.allocate(user.device, size), size};
      free.splice(free.begin(), made);
    }
    uint64_t loan = 0;
    if (user.capture != 0) {
      // One for each graph and stream, however many pieces it comes to hold.
      loan = known == users_.end() ? lend(user, graph) : known->second.loan;
    }
    Held& held = users_[user];
    held.loan = loan;
    // Smaller ones stay the user's: its kernels may be running, or its graph was captured with
    // them.
    held.pieces.splice(held.pieces.begin(), free, free.begin());
    return held.pieces.front().counters;
  }

 private:
  static constexpr int64_t kLeastCount = 1024;

  struct Piece {
    uint32_t* counters;
    int64_t count;
  };
  // Moved between lists by splicing, which cannot fail.
  using Pieces = std::list<Piece>;

  struct Held {
    Pieces pieces;  // the largest first
    uint64_t loan;
  };

  struct Loan {
    CounterUser user;
    uint64_t number;
  };

  struct Return {
    CounterPool& pool;
    std::list<Loan> loan;  // one
  };

  // The number of a new loan, which comes back with the graph's end.
  uint64_t lend(const CounterUser& user, Graph graph) {
    const uint64_t number = ++loans_;
    std::unique_ptr<Return> data(new Return{*this, std::list<Loan>(1, Loan{user, number})});
    device_.when_gone(graph, &released, data.get());
    data.release();
    return number;
  }

  // Called by CUDA, also while it runs something that this pool has asked for under its lock: so it
  // takes a lock of its own, under which nothing is called, and allocates nothing.
  static void released(void* data) {
    const std::unique_ptr<Return> held(static_cast<Return*>(data));
    CounterPool& pool = held->pool;
    const std::lock_guard<std::mutex> lock(pool.returned_mutex_);
    pool.returned_.splice(pool.returned_.end(), held->loan);
  }

  void take_back() {
    std::list<Loan> returned;
    {
      const std::lock_guard<std::mutex> lock(returned_mutex_);
      returned.swap(returned_);
    }
    for (const Loan& loan : returned) {
      const auto at = users_.find(loan.user);
      // A call that failed after lending holds nothing by that number.
      if (at == users_.end() || at->second.loan != loan.number) continue;
      Pieces& pieces = at->second.pieces;
      while (!pieces.empty()) {
        // There since the piece was taken from it.
        Pieces& free = free_.at({loan.user.device, pieces.front().count});
        free.splice(free.begin(), pieces, pieces.begin());
      }
      users_.erase(at);
    }
  }

  CounterDevice<Graph>& device_;
  std::mutex mutex_;  // of all but `returned_`
  std::map<CounterUser, Held> users_;
  std::map<std::pair<int, int64_t>, Pieces> free_;  // by device and size
  uint64_t loans_ = 0;
  std::mutex returned_mutex_;
  std::list<Loan> returned_;
};

}  // namespace qkernels::bindings
