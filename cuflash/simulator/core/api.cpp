// The functions that native.py calls through ctypes.
#include <cstdio>
#include <new>

#include "interrupt.h"
#include "machine.h"
#include "special_registers.h"
#include "table.h"
#include "validate.h"

#define SIM_EXPORT extern "C" __attribute__((visibility("default")))

using namespace sim;

// Bumped whenever a struct of program.h changes, so that a mismatch is an error and not a crash.
SIM_EXPORT int cuflash_simulator_abi() { return 6; }

// Instruction `index` of the table; 0 past the last one.
SIM_EXPORT int cuflash_simulator_instruction(u32 index, const char** name, const char** signature) {
  const std::vector<Entry>& entries = instruction_table().entries();
  if (index >= entries.size()) return 0;
  *name = entries[index].name.c_str();
  *signature = entries[index].signature.c_str();
  return 1;
}

SIM_EXPORT const char* cuflash_simulator_special_register(u32 number) { return special_register_name(number); }

// Null, and what is wrong in `message`, if the description does not make sense.
SIM_EXPORT Program* cuflash_simulator_create(const ProgramDescription* description, char* message, u32 room) {
  try {
    return make_program(*description).release();
  } catch (const InvalidProgram& invalid) {
    snprintf(message, room, "%s", invalid.message.c_str());
  } catch (const std::bad_alloc&) {
    snprintf(message, room, "the host has not enough memory for the program");
  }
  return nullptr;
}

SIM_EXPORT void cuflash_simulator_use_interpreter(const Interpreter* interpreter) { use_interpreter(*interpreter); }

SIM_EXPORT void cuflash_simulator_destroy(Program* program) { delete program; }

SIM_EXPORT u32 cuflash_simulator_rows(const Program* program) { return program->num_rows; }

// Name of a class of instructions; null past the last one.
SIM_EXPORT const char* cuflash_simulator_class_name(u32 number) { return class_name(number); }

// The class of each record, as a number.
SIM_EXPORT void cuflash_simulator_classes(const Program* program, u32 num_records, u8* classes) {
  for (size_t i = 0; i < num_records; ++i) classes[i] = u8(class_of(program->records[i]));
}

// The caller holds the interpreter's lock; see interrupt.h.
SIM_EXPORT int cuflash_simulator_launch(const Program* program, const LaunchDescription* description, CounterValues* counters, Report* report) {
  return launch(*program, *description, *counters, *report);
}
