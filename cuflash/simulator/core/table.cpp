// Collects the instructions of all families.
#include "table.h"

#include <iterator>

#include "access.h"

namespace sim {

void Table::add(std::string_view names, std::string_view signature, Handler handler, Class kind) {
  while (!names.empty()) {
    const size_t end = std::min(names.find(' '), names.size());
    entries_.push_back({std::string(names.substr(0, end)), std::string(signature), handler, kind});
    names.remove_prefix(std::min(end + 1, names.size()));
  }
}

const Table& instruction_table() {
  static const Table table = [] {
    Table t;
    register_control(t);
    register_integer(t);
    register_wide_integer(t);
    register_float(t);
    register_special_functions(t);
    register_half(t);
    register_compare(t);
    register_convert(t);
    register_convert_integer(t);
    register_convert_float(t);
    register_memory(t);
    register_atomic(t);
    register_matrix(t);
    register_scalar_matrix(t);
    register_ldmatrix(t);
    register_wgmma(t);
    register_wgmma_hazards(t);
    register_register_pool(t);
    register_collective(t);
    register_barrier(t);
    register_cluster_barrier(t);
    register_async_copy(t);
    register_mbarrier(t);
    register_bulk_copy(t);
    register_tensor_map(t);
    register_tensor_copy(t);
    return t;
  }();
  return table;
}

const char* class_name(u32 number) {
  static const char* const NAMES[] = {"matrix", "mufu",  "float", "integer", "convert", "shared",
                                      "global", "local", "move",  "control", "other",   "none"};
  return number < std::size(NAMES) ? NAMES[number] : nullptr;
}

Class class_of(const Record& record) {
  const Class kind = instruction_table().entries()[record.op].kind;
  if (kind != Class::MEMORY) return kind;
  switch (Space(record.c & 7)) {
    case Space::SHARED:
    case Space::CLUSTER:
      return Class::SHARED;
    case Space::LOCAL:
      return Class::LOCAL;
    case Space::PARAM:
      return Class::MOVE;
    default:
      return Class::GLOBAL;  // generic addresses too
  }
}

}  // namespace sim
