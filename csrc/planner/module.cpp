// Python module tokendance._planner; tokendance/_planner.pyi documents it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

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
Array take(std::vector<int32_t>&& values, std::vector<py::ssize_t> shape) {
  auto* owner = new std::vector<int32_t>(std::move(values));
  py::capsule free_owner(owner, [](void* p) { delete static_cast<std::vector<int32_t>*>(p); });
  return Array(std::move(shape), owner->data(), free_owner);
}

py::dict plan_work_arrays(const Array& row_agent, const Array& row_position, const Array& use_agent,
                          const Array& use_master, const Array& use_delta, const Array& use_length,
                          const Array& master_page_indptr, const Array& own_length,
                          const Array& own_page_indptr, const Array& own_position,
                          int32_t block_size, int32_t max_tile_rows, int32_t target_items,
                          int32_t max_splits, int32_t window,
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
  const py::ssize_t partials = size(list.row_partials);
  py::dict arrays;
  arrays["work"] = take(std::move(list.work), {work, kWorkFields});
  arrays["work_rows"] = take(std::move(list.work_rows), {work_rows});
  arrays["work_chunks"] = take(std::move(list.work_chunks), {chunks, kChunkFields});
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
  sizes["partials"] = capacity.partials;
  return sizes;
}

}  // namespace

PYBIND11_MODULE(_planner, m) {
  m.doc() = "Planner of work lists (csrc/planner).";
  m.def("plan_work", &plan_work_arrays, py::arg("row_agent"), py::arg("row_position"),
        py::arg("use_agent"), py::arg("use_master"), py::arg("use_delta"), py::arg("use_length"),
        py::arg("master_page_indptr"), py::arg("own_length"), py::arg("own_page_indptr"),
        py::arg("own_position"), py::kw_only(), py::arg("block_size"), py::arg("max_tile_rows"),
        py::arg("target_items"), py::arg("max_splits"), py::arg("window") = 0,
        py::arg("row_position_bound") = py::none(), py::arg("own_position_bound") = py::none());
  m.def("work_capacity", &work_capacity_sizes, py::kw_only(), py::arg("agents"), py::arg("rows"),
        py::arg("uses"), py::arg("masters"), py::arg("max_tile_rows"), py::arg("target_items"),
        py::arg("max_splits"));
}

}  // namespace tokendance
