// Python module tokendance._planner; tokendance/_planner.pyi documents it.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "planner/decide.h"
#include "planner/work_list.h"
#include "tokendance/round.h"

namespace py = pybind11;

namespace tokendance {
namespace {

using Array = py::array_t<int32_t, py::array::c_style>;

std::string shape_of(const Array& array) {
  std::string text = "[";
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    text += (i ? ", " : "") + std::to_string(array.shape(i));
  }
  return text + "]";
}

const int32_t* vector_data(const char* name, const Array& array, int64_t size) {
  if (array.ndim() != 1 || array.shape(0) != size) {
    throw std::invalid_argument(std::string(name) + ": expected [" + std::to_string(size) +
                                "], got " + shape_of(array));
  }
  return array.data();
}

const int32_t* vector_data(const char* name, const std::optional<Array>& array, int64_t size) {
  return array ? vector_data(name, *array, size) : nullptr;
}

// Number of segments that an indptr array of shape [segments + 1] delimits.
int64_t indptr_segments(const char* name, const Array& array) {
  if (array.ndim() != 1 || array.shape(0) < 1) {
    throw std::invalid_argument(std::string(name) + ": expected at least one element, got " +
                                shape_of(array));
  }
  for (py::ssize_t i = 0; i < array.shape(0); ++i) {
    if (array.at(i) < (i ? array.at(i - 1) : 0)) {
      throw std::invalid_argument(std::string(name) + ": expected ascending values from 0, got " +
                                  std::to_string(array.at(i)) + " at " + std::to_string(i));
    }
  }
  return array.shape(0) - 1;
}

// An array that owns the vector's memory.
template <typename T>
py::array_t<T> take(std::vector<T>&& values, std::vector<py::ssize_t> shape) {
  auto* owner = new std::vector<T>(std::move(values));
  py::capsule free_owner(owner, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return py::array_t<T>(std::move(shape), owner->data(), free_owner);
}
template <typename T>
py::array_t<T> take(std::vector<T>&& values) {
  const py::ssize_t size = static_cast<py::ssize_t>(values.size());
  return take(std::move(values), {size});
}
py::array_t<uint8_t> take(const std::vector<RowKind>& origins) {
  return py::array_t<uint8_t>(static_cast<py::ssize_t>(origins.size()),
                              reinterpret_cast<const uint8_t*>(origins.data()));
}

py::dict plan_work_arrays(const Array& row_agent, const Array& row_position, const Array& use_agent,
                          const Array& use_master, const Array& use_delta, const Array& use_length,
                          const Array& master_page_indptr, const Array& own_length,
                          const Array& own_page_indptr, const Array& own_position,
                          int32_t block_size, int32_t max_tile_rows, int32_t read_bound_rows,
                          int32_t target_items, int32_t max_splits, int32_t window,
                          const std::optional<Array>& row_position_bound,
                          const std::optional<Array>& own_position_bound) {
  WorkListInput input;
  input.num_rows = row_agent.size();
  input.row_agent = vector_data("row_agent", row_agent, input.num_rows);
  input.row_position = vector_data("row_position", row_position, input.num_rows);
  input.row_position_bound = vector_data("row_position_bound", row_position_bound, input.num_rows);
  input.num_uses = use_agent.size();
  input.use_agent = vector_data("use_agent", use_agent, input.num_uses);
  input.use_master = vector_data("use_master", use_master, input.num_uses);
  input.use_delta = vector_data("use_delta", use_delta, input.num_uses);
  input.use_length = vector_data("use_length", use_length, input.num_uses);
  input.num_masters = indptr_segments("master_page_indptr", master_page_indptr);
  input.master_page_indptr = master_page_indptr.data();
  input.num_agents = indptr_segments("own_page_indptr", own_page_indptr);
  input.own_page_indptr = own_page_indptr.data();
  input.own_length = vector_data("own_length", own_length, input.num_agents);
  const int64_t own_rows = int64_t{own_page_indptr.at(input.num_agents)} * block_size;
  input.own_position = vector_data("own_position", own_position, own_rows);
  input.own_position_bound = vector_data("own_position_bound", own_position_bound, own_rows);
  input.block_size = block_size;
  input.window = window;
  input.max_tile_rows = max_tile_rows;
  input.read_bound_rows = read_bound_rows;
  input.target_items = target_items;
  input.max_splits = max_splits;

  WorkList list;
  {
    py::gil_scoped_release unlocked;
    list = plan_work(input);
  }
  const auto size = [](const std::vector<int32_t>& v) {
    return static_cast<py::ssize_t>(v.size());
  };
  const py::ssize_t work = size(list.work) / kWorkFields;
  const py::ssize_t chunks = size(list.work_chunks) / kChunkFields;
  const py::ssize_t work_rows = size(list.work_rows);
  const py::ssize_t work_uses = size(list.work_uses);
  const py::ssize_t partials = size(list.row_partials);
  py::dict arrays;
  arrays["work"] = take(std::move(list.work), {work, kWorkFields});
  arrays["work_rows"] = take(std::move(list.work_rows), {work_rows});
  arrays["work_chunks"] = take(std::move(list.work_chunks), {chunks, kChunkFields});
  arrays["work_uses"] = take(std::move(list.work_uses), {work_uses});
  arrays["row_partial_indptr"] =
      take(std::move(list.row_partial_indptr), {static_cast<py::ssize_t>(input.num_rows) + 1});
  arrays["row_partials"] = take(std::move(list.row_partials), {partials});
  return arrays;
}

py::dict work_capacity_sizes(int64_t agents, int64_t rows, int64_t uses, int64_t masters,
                             int64_t max_tile_rows, int64_t target_items, int64_t max_splits) {
  const WorkCapacity capacity =
      work_capacity(agents, rows, uses, masters, max_tile_rows, target_items, max_splits);
  py::dict sizes;
  sizes["work"] = capacity.work;
  sizes["work_rows"] = capacity.work_rows;
  sizes["work_chunks"] = capacity.work_chunks;
  sizes["work_uses"] = capacity.work_uses;
  sizes["partials"] = capacity.partials;
  return sizes;
}

using Flags = py::array_t<uint8_t, py::array::c_style>;

const uint8_t* flag_data(const char* name, const Flags& flags, int64_t size) {
  if (flags.size() != size) {
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(size) +
                                " flags, got " + std::to_string(flags.size()));
  }
  return flags.data();
}

// A round's prompts, and what was found of them: kept between the two passes of its decision.
class RoundDecision {
 public:
  RoundDecision(Array place_indptr, Array segment, Flags is_shared, Array segment_length,
                Array prefix)
      : arrays_{std::move(place_indptr), std::move(segment), std::move(segment_length),
                std::move(prefix)},
        is_shared_(std::move(is_shared)) {
    const int64_t agents = indptr_segments("place_indptr", arrays_[0]);
    const int64_t places = arrays_[0].at(agents);
    prompts_.num_agents = agents;
    prompts_.num_segments = arrays_[2].size();
    prompts_.place_indptr = arrays_[0].data();
    prompts_.segment = vector_data("segment", arrays_[1], places);
    prompts_.is_shared = flag_data("is_shared", is_shared_, places);
    prompts_.segment_length = vector_data("segment_length", arrays_[2], prompts_.num_segments);
    prompts_.prefix = vector_data("prefix", arrays_[3], agents);
    for (int64_t place = 0; place < places; ++place) {
      const int32_t number = prompts_.segment[place];
      if (number < 0 || number >= prompts_.num_segments) {
        throw std::invalid_argument("segment: expected 0 to " +
                                    std::to_string(prompts_.num_segments - 1) + ", got " +
                                    std::to_string(number) + " at " + std::to_string(place));
      }
    }
  }

  void match(const Array& exact_prefix, const Array& earlier_context, const Flags& agent_computes,
             const Flags& segment_computes, const Array& stored, const Array& stored_rows,
             const Array& master_context, const Flags& master_is_exact,
             const Flags& master_has_seen, const Flags& known, const Flags& replaceable,
             int32_t shortest, const Flags& alone, bool informed, bool lone,
             std::function<int32_t(int32_t, int32_t)> chain) {
    const int64_t agents = prompts_.num_agents, segments = prompts_.num_segments;
    MatchInput input;
    input.prompts = prompts_;
    input.exact_prefix = vector_data("exact_prefix", exact_prefix, agents);
    input.earlier_context =
        vector_data("earlier_context", earlier_context, prompts_.place_indptr[agents]);
    input.agent_computes = flag_data("agent_computes", agent_computes, agents);
    input.segment_computes = flag_data("segment_computes", segment_computes, segments);
    input.num_masters = master_context.size();
    input.stored = vector_data("stored", stored, segments);
    input.stored_rows = vector_data("stored_rows", stored_rows, segments);
    input.master_context = master_context.data();
    input.master_is_exact = flag_data("master_is_exact", master_is_exact, input.num_masters);
    input.master_has_seen =
        flag_data("master_has_seen", master_has_seen, input.num_masters * segments);
    input.known = flag_data("known", known, segments);
    input.replaceable = flag_data("replaceable", replaceable, segments);
    input.shortest = shortest;
    input.alone = flag_data("alone", alone, segments);
    input.informed = informed;
    input.lone = lone;
    input.chain = std::move(chain);
    for (int64_t segment = 0; segment < segments; ++segment) {
      if (input.stored[segment] >= input.num_masters) {
        throw std::invalid_argument("stored: expected less than " +
                                    std::to_string(input.num_masters) + ", got " +
                                    std::to_string(input.stored[segment]));
      }
    }
    match_ = match_round(input);
  }

  Array order() const { return copied(match_.order); }
  Array unseen() const { return copied(match_.unseen); }
  Array exact_length() const { return copied(match_.exact_length); }

  py::list made() const {
    py::list result;
    for (const MadeMaster& master : match_.made) {
      result.append(py::make_tuple(master.agent, master.segment, master.origin, master.context,
                                   master.place, master.is_exact));
    }
    return result;
  }

  py::dict tile(const Array& repaired, int32_t block_size) const {
    Tiling tiling = tile_round(
        prompts_, match_,
        vector_data("repaired", repaired, static_cast<int64_t>(match_.origin.size())), block_size);
    py::dict arrays;
    arrays["span_indptr"] = take(std::move(tiling.span_indptr));
    arrays["span_end"] = take(std::move(tiling.span_end));
    arrays["span_kind"] = take(tiling.span_kind);
    arrays["use_indptr"] = take(std::move(tiling.use_indptr));
    arrays["use_master"] = take(std::move(tiling.use_master));
    arrays["use_delta"] = take(std::move(tiling.use_delta));
    arrays["use_length"] = take(std::move(tiling.use_length));
    arrays["use_kind"] = take(tiling.use_kind);
    arrays["mask_indptr"] = take(std::move(tiling.mask_indptr));
    arrays["masks"] = take(std::move(tiling.masks));
    arrays["own_indptr"] = take(std::move(tiling.own_indptr));
    arrays["own"] = take(std::move(tiling.own));
    return arrays;
  }

 private:
  static Array copied(const std::vector<int32_t>& values) {
    return Array(static_cast<py::ssize_t>(values.size()), values.data());
  }

  Array arrays_[4];
  Flags is_shared_;
  Prompts prompts_{};
  Match match_;
};

}  // namespace

PYBIND11_MODULE(_planner, m) {
  m.doc() = "Planner of decisions and work lists (csrc/planner).";
  m.attr("ROUND_VERSION") = kRoundVersion;
  py::class_<RoundDecision>(m, "RoundDecision")
      .def(py::init<Array, Array, Flags, Array, Array>(), py::arg("place_indptr"),
           py::arg("segment"), py::arg("is_shared"), py::arg("segment_length"), py::arg("prefix"))
      .def("match", &RoundDecision::match, py::kw_only(), py::arg("exact_prefix"),
           py::arg("earlier_context"), py::arg("agent_computes"), py::arg("segment_computes"),
           py::arg("stored"), py::arg("stored_rows"), py::arg("master_context"),
           py::arg("master_is_exact"), py::arg("master_has_seen"), py::arg("known"),
           py::arg("replaceable"), py::arg("shortest"), py::arg("alone"), py::arg("informed"),
           py::arg("lone"), py::arg("chain"))
      .def_property_readonly("order", &RoundDecision::order)
      .def_property_readonly("made", &RoundDecision::made)
      .def_property_readonly("unseen", &RoundDecision::unseen)
      .def_property_readonly("exact_length", &RoundDecision::exact_length)
      .def("tile", &RoundDecision::tile, py::arg("repaired"), py::arg("block_size"));
  m.def("plan_work", &plan_work_arrays, py::arg("row_agent"), py::arg("row_position"),
        py::arg("use_agent"), py::arg("use_master"), py::arg("use_delta"), py::arg("use_length"),
        py::arg("master_page_indptr"), py::arg("own_length"), py::arg("own_page_indptr"),
        py::arg("own_position"), py::kw_only(), py::arg("block_size"), py::arg("max_tile_rows"),
        py::arg("read_bound_rows") = 1, py::arg("target_items"), py::arg("max_splits"),
        py::arg("window") = 0, py::arg("row_position_bound") = py::none(),
        py::arg("own_position_bound") = py::none());
  m.def("work_capacity", &work_capacity_sizes, py::kw_only(), py::arg("agents"), py::arg("rows"),
        py::arg("uses"), py::arg("masters"), py::arg("max_tile_rows"), py::arg("target_items"),
        py::arg("max_splits"));
}

}  // namespace tokendance
