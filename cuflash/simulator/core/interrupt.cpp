// See interrupt.h.
#include "interrupt.h"

#include <csignal>
#include <mutex>

namespace sim {
namespace {

Interpreter python{};

// Counts SIGINTs while launches ask for it, and hands each to the handler that was there before, which is Python's.
std::atomic<unsigned> interrupts{0};
struct sigaction before{};
std::mutex counting_mutex;  // guards what follows
unsigned counting = 0;      // launches that ask for it
bool is_known = false;      // whether `before` holds a handler

void count_and_hand_on(int number, siginfo_t* info, void* context) {
  interrupts.fetch_add(1, std::memory_order_relaxed);
  if (before.sa_flags & SA_SIGINFO) before.sa_sigaction(number, info, context);
  else before.sa_handler(number);
}

bool is_same(const struct sigaction& a, const struct sigaction& b) {
  if ((a.sa_flags ^ b.sa_flags) & SA_SIGINFO) return false;
  return a.sa_flags & SA_SIGINFO ? a.sa_sigaction == b.sa_sigaction : a.sa_handler == b.sa_handler;
}

bool is_a_function(const struct sigaction& action) {
  return (action.sa_flags & SA_SIGINFO) || (action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN);
}

void begin_counting() {
  std::lock_guard<std::mutex> lock(counting_mutex);
  struct sigaction now{};
  if (counting++ || sigaction(SIGINT, nullptr, &now) != 0 || !is_a_function(now)) return;
  if (is_known && !is_same(now, before)) return;  // somebody came between who may call us: a circle would never end
  before = now, is_known = true;
  struct sigaction ours = now;
  ours.sa_flags |= SA_SIGINFO;
  ours.sa_sigaction = count_and_hand_on;
  sigaction(SIGINT, &ours, nullptr);
}

void end_counting() {
  std::lock_guard<std::mutex> lock(counting_mutex);
  struct sigaction now{};
  if (--counting || sigaction(SIGINT, nullptr, &now) != 0) return;
  if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == count_and_hand_on) sigaction(SIGINT, &before, nullptr);
}

}  // namespace

void use_interpreter(const Interpreter& interpreter) { python = interpreter; }

Interrupt::Interrupt(bool ends_on_interrupt) : ends_on_interrupt_(ends_on_interrupt), seen_(interrupts.load(std::memory_order_relaxed)) {
  if (ends_on_interrupt_) begin_counting();  // under the interpreter's lock, so that its main thread changes no handler meanwhile
  if (python.PyEval_SaveThread) thread_ = python.PyEval_SaveThread();
}

Interrupt::~Interrupt() {
  if (thread_) python.PyEval_RestoreThread(thread_);
  if (ends_on_interrupt_) end_counting();
}

bool Interrupt::must_stop() const {
  if (python.PyErr_CheckSignals() != 0) return true;
  if (!ends_on_interrupt_ || interrupts.load(std::memory_order_relaxed) == seen_) return false;
  python.PyErr_SetNone(python.PyExc_KeyboardInterrupt);
  return true;
}

void Interrupt::look() {
  if (!thread_) return;
  const auto now = std::chrono::steady_clock::now();
  if (now - last_ < INTERVAL) return;
  python.PyEval_RestoreThread(thread_);
  thread_ = nullptr;
  if (must_stop()) {  // the lock stays with us: what was raised is set in this thread
    stopped_ = true;
    return;
  }
  thread_ = python.PyEval_SaveThread();
  last_ = std::chrono::steady_clock::now();
}

}  // namespace sim
