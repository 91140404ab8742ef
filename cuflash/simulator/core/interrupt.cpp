// See interrupt.h.
#include "interrupt.h"

namespace sim {
namespace {

Interpreter python{};

}  // namespace

void use_interpreter(const Interpreter& interpreter) { python = interpreter; }

Interrupt::Interrupt() {
  if (python.PyEval_SaveThread) thread_ = python.PyEval_SaveThread();
}

Interrupt::~Interrupt() {
  if (thread_) python.PyEval_RestoreThread(thread_);
}

void Interrupt::look() {
  if (!thread_) return;
  const auto now = std::chrono::steady_clock::now();
  if (now - last_ < INTERVAL) return;
  python.PyEval_RestoreThread(thread_);
  thread_ = nullptr;
  if (python.PyErr_CheckSignals() != 0) {  // the lock stays with us: what was raised is set in this thread
    stopped_ = true;
    return;
  }
  thread_ = python.PyEval_SaveThread();
  last_ = std::chrono::steady_clock::now();
}

}  // namespace sim
