// Tests a program before anything is done with it, so that nothing that Python hands over makes the core leave its memory: kept programs come from a
// disk.
//
// Contract: `check_description` tests every number that is used as an index while a Program is made of a description, `check_program` what is left
// once registers have rows: where records jump and which part of `extra` they read. Both throw InvalidProgram. Rows need no test, see ROOM_FOR_ROWS
// in cta.cpp; nor does the end of the records, where make_program puts one that stops whoever comes there.
#pragma once

#include <string>

#include "program.h"

namespace sim {

struct InvalidProgram {
  std::string message;
};

constexpr u32 MAX_LOCAL_BYTES = 512 * 1024;         // of a thread, on any architecture
constexpr u32 MAX_SHARED_ADDRESS = 1u << 20;        // well beyond the shared memory of a multiprocessor
constexpr u32 EXTRA_PADDING = 256;                  // words behind `extra`: more than any instruction reads there but brx.idx
constexpr const char* PAST_THE_END = "past.the.end";  // of the records; no instruction of a program

void check_description(const ProgramDescription& description);
void check_program(const Program& program, u32 num_extra);

}  // namespace sim
