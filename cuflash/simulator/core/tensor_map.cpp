// Tensor maps that kernels make: tensormap.replace, tensormap.cp_fenceproxy, and what a map must be like.
//
// Contract: a map that has only zeros, or that encode_tiled made, can be changed field by field; a value that no map may have is an error at once, a
// combination that cannot be is one when a copy uses the map. Field numbers are those of instructions/tensor_map.py. Whether a
// fence.proxy.tensormap lies between a change and a copy that uses it is not checked.
#include "tensor_map.h"

#include <algorithm>

#include "access.h"
#include "cluster.h"
#include "global_shadow.h"
#include "shadow.h"
#include "table.h"

namespace sim {
namespace {

constexpr u32 MAX_BOX = 256, MAX_STEP = 8, ROW_GRANULE = 16, CP_ALIGNMENT = 128;
constexpr u64 MAX_STRIDE = u64(1) << 40, MAX_BOX_BYTES = 1 << 18;

enum class Field : u16 { GLOBAL_ADDRESS, RANK, BOX_DIM, GLOBAL_DIM, GLOBAL_STRIDE, ELEMENT_STRIDE, ELEMENT_TYPE, SWIZZLE_MODE, FILL_MODE };

bool is_floating(ElementType element) {
  return element == ElementType::F16 || element == ElementType::F32 || element == ElementType::F64 || element == ElementType::BF16;
}

// Sets a field; false if no map has such a value, or the field no such ordinal.
bool replace_field(TensorMap& map, Field field, u32 ordinal, u64 value) {
  if (ordinal >= (field == Field::GLOBAL_STRIDE ? TensorMap::MAX_RANK - 1 : TensorMap::MAX_RANK)) return false;
  switch (field) {
    case Field::GLOBAL_ADDRESS:
      map.address = value;
      return value % 16 == 0;
    case Field::RANK:  // counted from 0
      map.rank = u8(value + 1);
      return value < TensorMap::MAX_RANK;
    case Field::BOX_DIM:
      map.box[ordinal] = u16(value);
      return 1 <= value && value <= MAX_BOX;
    case Field::GLOBAL_DIM:
      map.extents[ordinal] = value;
      return value >= 1;
    case Field::GLOBAL_STRIDE:
      map.strides[ordinal] = value;
      return value % 16 == 0 && value < MAX_STRIDE;
    case Field::ELEMENT_STRIDE:
      map.steps[ordinal] = ordinal == 0 ? 1 : u8(value);  // the innermost is not looked at
      return 1 <= value && value <= MAX_STEP;
    case Field::ELEMENT_TYPE:
      map.element = ElementType(value);
      return value < u64(ElementType::COUNT);
    case Field::SWIZZLE_MODE:
      map.swizzle = Swizzle(value);
      return value <= u64(Swizzle::B128);
    case Field::FILL_MODE:
      map.fill_nan = value != 0;
      return value <= 1;
  }
  return false;
}

bool all_zero(const TensorMap& map) {
  const u8* bytes = (const u8*)&map;
  return std::all_of(bytes, bytes + sizeof map, [](u8 byte) { return byte == 0; });
}

// c = field, a = ordinal. Operands: the map, the new value in 64 bits.
const Record* replace(Warp& warp, const Record* in) {
  const u16* extra = warp.extra + in->x;
  const u64* values = warp.row<u64>(extra[ADDRESS_WORDS]);
  for_lanes(warp.mask(in), [&](int lane) {
    const u32 mask = 1u << lane;
    Pointers at;
    for (const Access access : {Access::READ, Access::WRITE}) {
      const Use use{access, sizeof(TensorMap), TensorMap::ALIGNMENT, "tensormap.replace"};
      resolve(warp, in, space_operand(extra), mask, address_operand(extra), use, at);
    }
    TensorMap map;
    memcpy(&map, at.lane[lane], sizeof map);
    if (all_zero(map)) map.magic = TensorMap::MAGIC;
    if (map.magic != TensorMap::MAGIC)
      warp.fail(in, "tensor-map", mask, "what the address names is neither a tensor map of the simulator (see tensor_map.py) nor all zeros");
    if (!replace_field(map, Field(in->c), in->a, values[lane]))
      warp.fail(in, "tensor-map", mask, "no tensor map has the value %llu in this field", (unsigned long long)values[lane]);
    memcpy(at.lane[lane], &map, sizeof map);
  });
  return in + 1;
}

// A warp copies a map from shared to global memory, and releases it. Operands: destination, source.
const Record* copy_and_release(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  if (SIM_UNLIKELY(mask != warp.present)) return warp.wait_for_lanes(in, warp.present);
  const u16* extra = warp.extra + in->x;
  Cta& cta = *warp.cta;
  if (cta.checks) warp.knowledge.synchronize(mask, warp.live);  // the lanes execute it together
  const u32 lane = u32(__builtin_ctz(mask));
  Pointers to, from;
  const char* const what = "tensormap.cp_fenceproxy";
  resolve(warp, in, space_operand(extra + ADDRESS_WORDS), 1u << lane, address_operand(extra + ADDRESS_WORDS),
          {Access::READ, sizeof(TensorMap), CP_ALIGNMENT, what}, from);
  resolve(warp, in, space_operand(extra), 1u << lane, address_operand(extra), {Access::WRITE, sizeof(TensorMap), CP_ALIGNMENT, what}, to);
  memcpy(to.lane[lane], from.lane[lane], sizeof(TensorMap));
  if (cta.checks) warp.knowledge.fence(mask, warp.live);
  if (in->a && cta.cluster->global) cta.cluster->global->fence(*cta.cluster);
  return in + 1;
}

}  // namespace

const char* TensorMap::problem() const {
  if (magic != MAGIC) return "what the address names is no tensor map of the simulator (see tensor_map.py)";
  if (rank < 1 || rank > MAX_RANK) return "a tensor map without a rank";
  if (element >= ElementType::COUNT || swizzle > Swizzle::B128) return "a tensor map whose element type or swizzle cannot be";
  if (address % 16 != 0) return "a tensor map whose address is not a multiple of 16";
  for (u32 i = 0; i < rank; ++i) {
    if (box[i] < 1 || box[i] > MAX_BOX) return "a tensor map whose box lacks an extent";
    if (extents[i] < 1) return "a tensor map that lacks an extent";
    if (steps[i] < 1 || steps[i] > MAX_STEP) return "a tensor map that lacks an element stride";
    if (i > 0 && (strides[i - 1] % 16 != 0 || strides[i - 1] >= MAX_STRIDE))
      return "a tensor map with a stride that is not a multiple of 16 below 2^40";
  }
  u64 elements = 1;
  for (u32 i = 0; i < rank; ++i) elements *= count(i);
  if (elements * element_bytes(element) > MAX_BOX_BYTES) return "a tensor map with a box that no shared memory has room for";
  if (fill_nan && !is_floating(element)) return "a tensor map that fills other elements than floats with NaN";
  const u32 row = count(0) * element_bytes(element), span = swizzle == Swizzle::NONE ? row : 16u << u32(swizzle);
  if (row % ROW_GRANULE != 0) return "a tensor map with rows of a box that are not multiples of 16 bytes";
  if (row != span) return "a tensor map with rows of a box that do not fill the span of the swizzle";
  return nullptr;
}

void register_tensor_map(Table& table) {
  table.family(Class::OTHER);
  table.add("tensormap.replace", "", replace);
  table.add("tensormap.cp_fenceproxy", "", copy_and_release);
}

}  // namespace sim
