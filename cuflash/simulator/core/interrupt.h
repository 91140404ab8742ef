// Signals during a launch: Ctrl-C, and whatever else the Python program handles.
//
// Contract: an `Interrupt` lives in the thread that called `launch`, which holds the interpreter's lock then; it gives the lock back for as long as
// it lives. Some twenty times a second it takes the lock and lets the interpreter run its signal handlers. If one of them raises, every thread of the
// launch is told to stop by `Interrupted`, the exception stays set, and ctypes raises it when the call returns.
#pragma once

#include <atomic>
#include <chrono>

#include "lanes.h"

namespace sim {

// Functions of the interpreter, by their names in its C API; null where there is none.
struct Interpreter {
  void* (*PyEval_SaveThread)();
  void (*PyEval_RestoreThread)(void*);
  int (*PyErr_CheckSignals)();
};
void use_interpreter(const Interpreter& interpreter);

struct Interrupted {};

class Interrupt {
 public:
  Interrupt();
  ~Interrupt();
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;

  static constexpr std::chrono::milliseconds INTERVAL{50};

  // Throws Interrupted once the launch is to stop.
  SIM_INLINE void check() const {
    if (SIM_UNLIKELY(stopped_.load(std::memory_order_relaxed))) throw Interrupted{};
  }
  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }
  // Of the calling thread only: lets handlers run if INTERVAL has passed. Never throws.
  void look();

 private:
  std::atomic<bool> stopped_{false};
  void* thread_ = nullptr;  // the interpreter's state of this thread while the lock is given back
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace sim
