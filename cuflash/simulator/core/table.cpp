// Collects the instructions of all families.
#include "table.h"

namespace sim {

void Table::add(std::string_view names, std::string_view signature, Handler handler) {
  while (!names.empty()) {
    const size_t end = std::min(names.find(' '), names.size());
    entries_.push_back({std::string(names.substr(0, end)), std::string(signature), handler});
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
    register_ldmatrix(t);
    register_collective(t);
    register_barrier(t);
    register_async_copy(t);
    register_mbarrier(t);
    register_bulk_copy(t);
    register_tensor_copy(t);
    return t;
  }();
  return table;
}

}  // namespace sim
