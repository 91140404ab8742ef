// Signals during a launch: Ctrl-C, and whatever else the Python program handles.
//
// Contract: an `Interrupt` lives in the thread that called `launch`, which holds the interpreter's lock then; it gives the lock back for as long as
// it lives. Some twenty times a second it looks whether the launch is to stop. In the interpreter's main thread it takes the lock and lets signal
// handlers run, and one that raises stops the launch. Handlers never run in other threads: there SIGINT itself stops the launch, with
// KeyboardInterrupt, if the caller says so (`LaunchDescription::ends_on_interrupt`). Every thread of a launch that is to stop is told so by
// `Interrupted`, the exception stays set, and ctypes raises it when the call returns.
#pragma once

#include <atomic>
#include <chrono>

#include "lanes.h"

namespace sim {

// Functions and one object of the interpreter, by their names in its C API; null where there is none.
struct Interpreter {
  void* (*PyEval_SaveThread)();
  void (*PyEval_RestoreThread)(void*);
  int (*PyErr_CheckSignals)();
  void (*PyErr_SetNone)(void*);
  void* PyExc_KeyboardInterrupt;
};
void use_interpreter(const Interpreter& interpreter);

struct Interrupted {};

class Interrupt {
 public:
  explicit Interrupt(bool ends_on_interrupt);
  ~Interrupt();
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;

  static constexpr std::chrono::milliseconds INTERVAL{50};

  // Throws Interrupted once the launch is to stop.
  SIM_INLINE void check() const {
    if (SIM_UNLIKELY(stopped_.load(std::memory_order_relaxed))) throw Interrupted{};
  }
  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }
  // Of the calling thread only: looks whether the launch is to stop, if INTERVAL has passed. Never throws.
  void look();

 private:
  bool must_stop() const;  // leaves the exception set then

  std::atomic<bool> stopped_{false};
  const bool ends_on_interrupt_;
  const unsigned seen_;     // SIGINTs until the launch began
  void* thread_ = nullptr;  // the interpreter's state of this thread while the lock is given back
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace sim
