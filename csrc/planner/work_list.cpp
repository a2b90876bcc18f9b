#include "planner/work_list.h"

#include <algorithm>
#include <numeric>
#include <sstream>
#include <stdexcept>

#include "tokendance/round.h"

namespace tokendance {
namespace {

// A split of fewer keys does not pay for its merge, and for rotating its queries.
constexpr int64_t kMinSplitKeys = 256;
// Splits begin at multiples of so many pages of a chunk: kernels load keys by the tile.
constexpr int64_t kSplitAlignment = 4;

struct Chunk {
  int32_t source;
  int32_t page_begin;
  int32_t page_end;
};

struct PageRange {
  int32_t begin = 0;
  int32_t end = 0;
  bool empty() const { return begin >= end; }
};

struct AgentUse {
  int32_t use;
  int32_t master;
  int32_t delta;
  int32_t length;
  PageRange pages;  // that any row of the agent sees
};

// Positions of a range of rows: lowest and highest that any of them may have.
struct Positions {
  int32_t low;
  int32_t high;
};

// The rows of an agent that a tile of several agents holds.
struct Portion {
  int32_t agent;
  int64_t row_begin, row_end;
  Positions positions{};
  bool shares = false;  // sees a Master that another agent of the tile sees too
};

// A tile with its chunks, before it is split.
struct Tile {
  int64_t row_begin, row_end;      // in work_rows
  int64_t chunk_begin, chunk_end;  // in Planner::chunks_
  int64_t use_begin;               // in work_uses
  int64_t uses_of_chunk;
  int64_t pages;
  int64_t cost;
  bool merged;  // its rows are in another tile too
  int32_t splits = 1;
};

struct Item {
  int64_t tile;
  int64_t chunk_begin, chunk_end;  // in WorkList::work_chunks
  int64_t use_begin;               // in work_uses
  int64_t cost;
  int64_t partial_begin;
};

// The text is only made for the failure: checks stand in loops over every entry.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

class Planner {
 public:
  explicit Planner(const WorkListInput& input) : in_(input) {}

  WorkList run() {
    check_scalars();
    while ((1 << page_shift_) < in_.block_size) ++page_shift_;
    find_rows();
    find_uses();
    plan_tiles();
    split_tiles();
    emit();
    return std::move(out_);
  }

 private:
  void check_scalars() const {
    auto positive = [](const char* name, int32_t value) {
      check(value > 0, name, ": expected a positive number, got ", value);
    };
    check(in_.block_size > 0 && (in_.block_size & (in_.block_size - 1)) == 0,
          "block_size: expected a power of two, got ", in_.block_size);
    positive("max_tile_rows", in_.max_tile_rows);
    positive("read_bound_rows", in_.read_bound_rows);
    positive("target_items", in_.target_items);
    positive("max_splits", in_.max_splits);
    check(in_.window >= 0, "window: expected 0 (none) or more, got ", in_.window);
  }

  int32_t high_position(int64_t row) const {
    return in_.row_position_bound ? in_.row_position_bound[row] : in_.row_position[row];
  }

  void find_rows() {
    agent_rows_.assign(in_.num_agents, {0, 0});
    for (int64_t row = 0; row < in_.num_rows;) {
      const int32_t agent = in_.row_agent[row];
      if (agent < 0) {
        ++row;
        continue;
      }
      check(agent < in_.num_agents, "row_agent: expected less than ", in_.num_agents, ", got ",
            agent);
      check(agent_rows_[agent].second == 0,
            "row_agent: expected the rows of an agent to be adjacent, but agent ", agent,
            " comes again at row ", row);
      const int64_t begin = row++;
      while (row < in_.num_rows && in_.row_agent[row] == agent) {
        check(in_.row_position[row - 1] <= in_.row_position[row] &&
                  high_position(row - 1) <= high_position(row),
              "row_position: expected the rows of an agent to ascend, but row ", row, " does not");
        ++row;
      }
      agent_rows_[agent] = {begin, row};
    }
  }

  Positions positions(int64_t row_begin, int64_t row_end) const {
    return {in_.row_position[row_begin], high_position(row_end - 1)};
  }

  // Pages of the rows [first, end).
  PageRange page_range(int64_t first, int64_t end) const {
    return {static_cast<int32_t>(first >> page_shift_),
            static_cast<int32_t>((end + in_.block_size - 1) >> page_shift_)};
  }

  // Pages of a use that rows at these positions may see: row j iff delta + j <= p and, with a
  // window, j > p - window - delta.
  PageRange visible_pages(int32_t delta, int32_t length, Positions p) const {
    const int64_t reach = std::min<int64_t>(length, int64_t{p.high} - delta + 1);
    if (reach <= 0) return {};
    int64_t first = 0;
    if (in_.window > 0) first = std::max<int64_t>(0, int64_t{p.low} - in_.window - delta + 1);
    if (first >= reach) return {};
    return page_range(first, reach);
  }

  PageRange visible_own_pages(int32_t agent, Positions p) const {
    const int64_t start = int64_t{in_.own_page_indptr[agent]} * in_.block_size;
    const int64_t length = in_.own_length[agent];
    const int32_t* low = in_.own_position + start;
    const int32_t* high = (in_.own_position_bound ? in_.own_position_bound : in_.own_position);
    high += start;
    const int64_t reach = std::upper_bound(low, low + length, p.high) - low;
    int64_t first = 0;
    if (in_.window > 0) {
      const int64_t lowest = int64_t{p.low} - in_.window;  // the highest position out of sight
      first = std::partition_point(high, high + length,
                                   [lowest](int32_t position) { return position <= lowest; }) -
              high;
    }
    if (first >= reach) return {};
    return page_range(first, reach);
  }

  void find_uses() {
    use_indptr_.assign(in_.num_agents + 1, 0);
    for (int64_t use = 0; use < in_.num_uses; ++use) {
      const int32_t agent = in_.use_agent[use];
      if (agent < 0) continue;
      check(agent < in_.num_agents, "use_agent: expected less than ", in_.num_agents, ", got ",
            agent);
      const int32_t master = in_.use_master[use];
      check(master >= 0 && master < in_.num_masters, "use_master: expected 0 .. ",
            in_.num_masters - 1, ", got ", master);
      const int64_t pages = in_.master_page_indptr[master + 1] - in_.master_page_indptr[master];
      check(in_.use_length[use] >= 0 && in_.use_length[use] <= pages * in_.block_size,
            "use_length: expected 0 .. ", pages * in_.block_size, " of Master ", master, ", got ",
            in_.use_length[use]);
      ++use_indptr_[agent + 1];
    }
    std::partial_sum(use_indptr_.begin(), use_indptr_.end(), use_indptr_.begin());
    uses_.resize(use_indptr_.back());
    std::vector<int64_t> at(use_indptr_.begin(), use_indptr_.end() - 1);
    for (int64_t use = 0; use < in_.num_uses; ++use) {
      const int32_t agent = in_.use_agent[use];
      if (agent < 0) continue;
      AgentUse& entry = uses_[at[agent]++];
      entry = {static_cast<int32_t>(use),
               in_.use_master[use],
               in_.use_delta[use],
               in_.use_length[use],
               {}};
      const auto [begin, end] = agent_rows_[agent];
      if (begin == end) continue;
      entry.pages = visible_pages(entry.delta, entry.length, positions(begin, end));
    }
    for (int64_t agent = 0; agent < in_.num_agents; ++agent) {
      const int64_t pages = in_.own_page_indptr[agent + 1] - in_.own_page_indptr[agent];
      check(in_.own_length[agent] >= 0 && in_.own_length[agent] <= pages * in_.block_size,
            "own_length: expected 0 .. ", pages * in_.block_size, " of agent ", agent, ", got ",
            in_.own_length[agent]);
    }
  }

  // Tiles -----------------------------------------------------------------------------------------

  void begin_tile() {
    tile_row_begin_ = out_.work_rows.size();
    tile_chunk_begin_ = chunks_.size();
    tile_use_begin_ = out_.work_uses.size();
  }

  void add_row_range(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      out_.work_rows.push_back(static_cast<int32_t>(row));
    }
  }

  void add_chunk(int32_t source, PageRange pages) {
    chunks_.push_back({source, pages.begin, pages.end});
  }

  // To a tile of one agent's rows.
  void add_chunk_of_agent(const AgentUse& use, PageRange pages) {
    if (pages.empty()) return;
    add_chunk(use.master, pages);
    out_.work_uses.push_back(use.use);
  }
  void add_own_chunk(int32_t agent, Positions p) {
    const PageRange pages = visible_own_pages(agent, p);
    if (pages.empty()) return;
    add_chunk(-1 - agent, pages);
    out_.work_uses.push_back(-1);
  }

  void end_tile(int64_t uses_of_chunk, bool merged) {
    const int64_t row_end = out_.work_rows.size();
    const int64_t chunk_end = chunks_.size();
    int64_t pages = 0;
    for (int64_t i = tile_chunk_begin_; i < chunk_end; ++i) {
      pages += chunks_[i].page_end - chunks_[i].page_begin;
    }
    const int64_t rows = row_end - tile_row_begin_;
    const int64_t cost = pages * std::max<int64_t>(rows, in_.read_bound_rows);
    tiles_.push_back({tile_row_begin_, row_end, tile_chunk_begin_, chunk_end, tile_use_begin_,
                      uses_of_chunk, pages, cost, merged});
  }

  void plan_tiles() {
    std::vector<int32_t> together;
    for (int64_t agent = 0; agent < in_.num_agents; ++agent) {
      const int64_t rows = agent_rows_[agent].second - agent_rows_[agent].first;
      if (rows == 0) continue;
      // Others in tiles that one agent fills to three quarters would save little.
      if (4 * rows > 3 * int64_t{in_.max_tile_rows}) {
        plan_agent_alone(static_cast<int32_t>(agent));
      } else {
        together.push_back(static_cast<int32_t>(agent));
      }
    }
    plan_agents_together(together);
  }

  void plan_agent_alone(int32_t agent) {
    const auto [begin, end] = agent_rows_[agent];
    const int64_t rows = end - begin;
    const int64_t count = (rows + in_.max_tile_rows - 1) / in_.max_tile_rows;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = begin + rows * i / count;
      const int64_t last = begin + rows * (i + 1) / count;
      const Positions p = positions(first, last);
      begin_tile();
      add_row_range(first, last);
      for (int64_t u = use_indptr_[agent]; u < use_indptr_[agent + 1]; ++u) {
        const AgentUse& use = uses_[u];
        if (use.pages.empty()) continue;
        add_chunk_of_agent(use, visible_pages(use.delta, use.length, p));
      }
      add_own_chunk(agent, p);
      end_tile(1, false);
    }
  }

  // Clusters of agents that share most of their Master pages, each cut into tiles of equal height.
  void plan_agents_together(const std::vector<int32_t>& agents) {
    // Users of every Master among these agents.
    std::vector<int64_t> user_indptr(in_.num_masters + 1, 0);
    for (int32_t agent : agents) {
      for (int64_t u = use_indptr_[agent]; u < use_indptr_[agent + 1]; ++u) {
        if (!uses_[u].pages.empty()) ++user_indptr[uses_[u].master + 1];
      }
    }
    std::partial_sum(user_indptr.begin(), user_indptr.end(), user_indptr.begin());
    struct User {
      int32_t agent;
      int32_t pages;
    };
    std::vector<User> users(user_indptr.back());
    std::vector<int64_t> at(user_indptr.begin(), user_indptr.end() - 1);
    for (int32_t agent : agents) {
      for (int64_t u = use_indptr_[agent]; u < use_indptr_[agent + 1]; ++u) {
        const AgentUse& use = uses_[u];
        if (use.pages.empty()) continue;
        users[at[use.master]++] = {agent, use.pages.end - use.pages.begin};
      }
    }
    // Pages of an agent's Masters that another agent sees too, and how many of them the Masters of
    // the growing cluster cover.
    std::vector<int64_t> shareable(in_.num_agents, 0), covered(in_.num_agents, 0);
    for (int64_t master = 0; master < in_.num_masters; ++master) {
      if (user_indptr[master + 1] - user_indptr[master] < 2) continue;
      for (int64_t i = user_indptr[master]; i < user_indptr[master + 1]; ++i) {
        shareable[users[i].agent] += users[i].pages;
      }
    }

    std::vector<int32_t> waiting = agents;
    std::vector<int64_t> in_cluster(in_.num_masters, -1);
    std::vector<int32_t> cluster;
    for (int64_t cluster_id = 0; !waiting.empty(); ++cluster_id) {
      std::fill(covered.begin(), covered.end(), 0);
      cluster.clear();
      size_t next = 0;
      bool found = true;
      while (found) {
        const int32_t agent = waiting[next];
        waiting.erase(waiting.begin() + static_cast<std::ptrdiff_t>(next));
        cluster.push_back(agent);
        for (int64_t u = use_indptr_[agent]; u < use_indptr_[agent + 1]; ++u) {
          const int32_t master = uses_[u].master;
          if (uses_[u].pages.empty() || in_cluster[master] == cluster_id) continue;
          in_cluster[master] = cluster_id;
          for (int64_t i = user_indptr[master]; i < user_indptr[master + 1]; ++i) {
            covered[users[i].agent] += users[i].pages;
          }
        }
        // The agent with the most pages in common beyond those it would add; one that would add
        // more than it has in common reads its Masters in a cluster of its own.
        found = false;
        int64_t best = 0;
        for (size_t i = 0; i < waiting.size(); ++i) {
          const int32_t candidate = waiting[i];
          if (covered[candidate] == 0) continue;
          const int64_t gain = 2 * covered[candidate] - shareable[candidate];
          if (gain < 0 || (found && gain <= best)) continue;
          found = true;
          best = gain;
          next = i;
        }
      }
      cut_cluster(cluster);
    }
  }

  void cut_cluster(const std::vector<int32_t>& cluster) {
    int64_t rows = 0;
    for (int32_t agent : cluster) rows += agent_rows_[agent].second - agent_rows_[agent].first;
    const int64_t count = (rows + in_.max_tile_rows - 1) / in_.max_tile_rows;
    std::vector<Portion> portions;
    int64_t tile = 0, passed = 0;
    for (int32_t agent : cluster) {
      auto [begin, end] = agent_rows_[agent];
      while (begin < end) {
        const int64_t tile_end = rows * (tile + 1) / count;
        const int64_t stop = std::min(end, begin + tile_end - passed);
        portions.push_back({agent, begin, stop});
        passed += stop - begin;
        begin = stop;
        if (passed < tile_end) continue;
        plan_shared_tile(portions);
        portions.clear();
        ++tile;
      }
    }
  }

  void plan_shared_tile(std::vector<Portion>& portions) {
    std::sort(portions.begin(), portions.end(),
              [](const Portion& a, const Portion& b) { return a.row_begin < b.row_begin; });
    struct Shared {
      int32_t users = 0;
      PageRange pages;
    };
    master_slot_.resize(in_.num_masters, -1);
    std::vector<int32_t> masters;
    std::vector<Shared> shared;
    for (Portion& portion : portions) {
      portion.positions = positions(portion.row_begin, portion.row_end);
      for (int64_t u = use_indptr_[portion.agent]; u < use_indptr_[portion.agent + 1]; ++u) {
        AgentUse& use = uses_[u];
        // Of the rows of this portion; another one of the agent sets it anew.
        use.pages = visible_pages(use.delta, use.length, portion.positions);
        if (use.pages.empty()) continue;
        int32_t& slot = master_slot_[use.master];
        if (slot < 0) {
          slot = static_cast<int32_t>(masters.size());
          masters.push_back(use.master);
          shared.push_back({0, use.pages});
        }
        Shared& entry = shared[slot];
        ++entry.users;
        entry.pages.begin = std::min(entry.pages.begin, use.pages.begin);
        entry.pages.end = std::max(entry.pages.end, use.pages.end);
      }
    }
    auto is_shared = [&](const AgentUse& use) {
      return !use.pages.empty() && shared[master_slot_[use.master]].users > 1;
    };

    for (Portion& portion : portions) {
      for (int64_t u = use_indptr_[portion.agent]; u < use_indptr_[portion.agent + 1]; ++u) {
        portion.shares |= is_shared(uses_[u]);
      }
    }
    // The own tiles first, so that the shared tile knows whether its rows are in others too.
    bool all_direct = true;
    for (const Portion& portion : portions) {
      begin_tile();
      for (int64_t u = use_indptr_[portion.agent]; u < use_indptr_[portion.agent + 1]; ++u) {
        if (!is_shared(uses_[u])) add_chunk_of_agent(uses_[u], uses_[u].pages);
      }
      add_own_chunk(portion.agent, portion.positions);
      // Without anything to see and without a shared tile the rows still want their zeros written.
      const bool has_chunks = static_cast<int64_t>(chunks_.size()) > tile_chunk_begin_;
      if (portion.shares && !has_chunks) continue;
      add_row_range(portion.row_begin, portion.row_end);
      end_tile(1, portion.shares);
      if (portion.shares) all_direct = false;
    }
    begin_tile();
    for (const Portion& portion : portions) {
      if (portion.shares) add_row_range(portion.row_begin, portion.row_end);
    }
    // From here on the slot of a Master is the number of its chunk, if it has one.
    int32_t chunks = 0;
    for (size_t slot = 0; slot < masters.size(); ++slot) {
      const bool met = shared[slot].users > 1;
      if (met) add_chunk(masters[slot], shared[slot].pages);
      master_slot_[masters[slot]] = met ? chunks++ : -1;
    }
    const int64_t rows = static_cast<int64_t>(out_.work_rows.size()) - tile_row_begin_;
    if (rows > 0) {
      add_uses(portions, chunks, rows);
      end_tile(rows, !all_direct);
    }
    for (int32_t master : masters) master_slot_[master] = -1;
  }

  // The uses by which the rows of a tile of several agents meet its chunks, which master_slot_
  // numbers.
  void add_uses(const std::vector<Portion>& portions, int64_t chunks, int64_t rows) {
    out_.work_uses.resize(tile_use_begin_ + chunks * rows, -1);
    int32_t* first_row = out_.work_uses.data() + tile_use_begin_;
    for (const Portion& portion : portions) {
      if (!portion.shares) continue;
      const int64_t count = portion.row_end - portion.row_begin;
      for (int64_t u = use_indptr_[portion.agent]; u < use_indptr_[portion.agent + 1]; ++u) {
        const int32_t chunk = master_slot_[uses_[u].master];
        if (chunk >= 0) std::fill_n(first_row + chunk * rows, count, uses_[u].use);
      }
      first_row += count;
    }
  }

  // Items -----------------------------------------------------------------------------------------

  void split_tiles() {
    int64_t total = 0;
    for (const Tile& tile : tiles_) total += tile.cost;
    for (Tile& tile : tiles_) {
      if (tile.cost == 0) continue;
      // cost / (total / target_items). A tile whose rows are merged anyway is split as soon as it
      // exceeds its share; another only if it is twice as long.
      const int64_t product = tile.cost * in_.target_items;
      int64_t splits = tile.merged ? (product + total - 1) / total : product / total;
      const int64_t most = tile.pages * in_.block_size / kMinSplitKeys;
      splits = std::min({splits, most, int64_t{in_.max_splits}});
      tile.splits = static_cast<int32_t>(std::max<int64_t>(splits, 1));
    }
  }

  void emit() {
    std::vector<Item> items;
    out_.work_chunks.reserve((chunks_.size() + tiles_.size()) * kChunkFields);
    int64_t partials = 0;
    for (size_t t = 0; t < tiles_.size(); ++t) {
      const Tile& tile = tiles_[t];
      const bool writes_partials = tile.merged || tile.splits > 1;
      int64_t chunk = tile.chunk_begin;
      int64_t offset = 0;  // pages of `chunk` that earlier splits took
      int64_t passed = 0;  // pages of earlier chunks
      for (int32_t split = 0; split < tile.splits; ++split) {
        const int64_t end = tile.pages * (split + 1) / tile.splits;
        const int64_t use_begin = tile.use_begin + (chunk - tile.chunk_begin) * tile.uses_of_chunk;
        const int64_t begin_chunk = out_.work_chunks.size() / kChunkFields;
        int64_t pages = 0;
        while (chunk < tile.chunk_end) {
          const Chunk& c = chunks_[chunk];
          const int64_t length = c.page_end - c.page_begin;
          int64_t stop = length;
          if (split + 1 < tile.splits && passed + length > end) {
            stop = std::min(
                length, (end - passed + kSplitAlignment / 2) / kSplitAlignment * kSplitAlignment);
          }
          if (stop > offset) {
            emit_chunk(c, offset, stop);
            pages += stop - offset;
          }
          if (stop < length) {
            offset = stop;
            break;
          }
          passed += length;
          ++chunk;
          offset = 0;
          if (split + 1 < tile.splits && passed >= end) break;
        }
        const int64_t end_chunk = out_.work_chunks.size() / kChunkFields;
        const int64_t cost = tile.pages ? tile.cost / tile.pages * pages : 0;
        items.push_back({static_cast<int64_t>(t), begin_chunk, end_chunk, use_begin, cost,
                         writes_partials ? partials : -1});
        if (writes_partials) partials += tile.row_end - tile.row_begin;
      }
    }
    emit_partials(items, partials);

    // Items of one cost in the order of what they read: tiles that meet the same pages run
    // together, and the second finds them in the cache.
    const auto place = [this](const Item& item) -> std::pair<int32_t, int32_t> {
      if (item.chunk_begin == item.chunk_end) return {INT32_MAX, 0};
      const int32_t* chunk = &out_.work_chunks[item.chunk_begin * kChunkFields];
      return {chunk[0], chunk[1]};
    };
    std::stable_sort(items.begin(), items.end(), [&](const Item& a, const Item& b) {
      return a.cost != b.cost ? a.cost > b.cost : place(a) < place(b);
    });
    out_.work.reserve(items.size() * kWorkFields);
    for (const Item& item : items) {
      const Tile& tile = tiles_[item.tile];
      const int32_t fields[kWorkFields] = {
          static_cast<int32_t>(tile.row_begin),     static_cast<int32_t>(tile.row_end),
          static_cast<int32_t>(item.chunk_begin),   static_cast<int32_t>(item.chunk_end),
          static_cast<int32_t>(item.partial_begin), static_cast<int32_t>(item.use_begin),
          static_cast<int32_t>(tile.uses_of_chunk)};
      out_.work.insert(out_.work.end(), fields, fields + kWorkFields);
    }
  }

  // Pages `begin` to `end` of a chunk. Own rows end within their last page.
  void emit_chunk(const Chunk& c, int64_t begin, int64_t end) {
    const int64_t row_begin = (c.page_begin + begin) << page_shift_;
    int64_t row_end = (c.page_begin + end) << page_shift_;
    if (c.source < 0) row_end = std::min<int64_t>(row_end, in_.own_length[-1 - c.source]);
    const int32_t list =
        c.source >= 0 ? in_.master_page_indptr[c.source] : in_.own_page_indptr[-1 - c.source];
    const int32_t fields[kChunkFields] = {c.source, static_cast<int32_t>(row_begin),
                                          static_cast<int32_t>(row_end), list};
    out_.work_chunks.insert(out_.work_chunks.end(), fields, fields + kChunkFields);
  }

  void emit_partials(const std::vector<Item>& items, int64_t partials) {
    out_.row_partial_indptr.assign(in_.num_rows + 1, 0);
    out_.row_partials.resize(partials);
    auto for_each_partial = [&](auto&& body) {
      for (const Item& item : items) {
        if (item.partial_begin < 0) continue;
        const Tile& tile = tiles_[item.tile];
        for (int64_t i = tile.row_begin; i < tile.row_end; ++i) {
          body(out_.work_rows[i], static_cast<int32_t>(item.partial_begin + i - tile.row_begin));
        }
      }
    };
    for_each_partial([&](int32_t row, int32_t) { ++out_.row_partial_indptr[row + 1]; });
    std::partial_sum(out_.row_partial_indptr.begin(), out_.row_partial_indptr.end(),
                     out_.row_partial_indptr.begin());
    if (partials == 0) return;
    std::vector<int32_t> at(out_.row_partial_indptr.begin(), out_.row_partial_indptr.end() - 1);
    for_each_partial([&](int32_t row, int32_t partial) { out_.row_partials[at[row]++] = partial; });
  }

  const WorkListInput& in_;
  WorkList out_;
  std::vector<std::pair<int64_t, int64_t>> agent_rows_;  // [N] range of rows
  std::vector<int64_t> use_indptr_;                      // [N+1]
  std::vector<AgentUse> uses_;
  std::vector<Chunk> chunks_;
  std::vector<Tile> tiles_;
  std::vector<int32_t> master_slot_;
  int page_shift_ = 0;
  int64_t tile_row_begin_ = 0;
  int64_t tile_chunk_begin_ = 0;
  int64_t tile_use_begin_ = 0;
};

}  // namespace

WorkList plan_work(const WorkListInput& input) { return Planner(input).run(); }

WorkCapacity work_capacity(int64_t agents, int64_t rows, int64_t uses, int64_t masters,
                           int64_t max_tile_rows, int64_t target_items, int64_t max_splits) {
  agents = std::min(agents, rows);
  const int64_t full_tiles = rows / max_tile_rows;
  // Together: a shared tile for at least two agents, and one more where rows exceed a tile, which
  // cuts one agent in two; an own tile for each portion of an agent. Alone: ceil(rows / tile).
  const int64_t shared_tiles = agents / 2 + full_tiles;
  const int64_t own_tiles = agents + full_tiles;
  const int64_t tiles = shared_tiles + own_tiles;
  const int64_t extra = std::min(target_items, tiles * (max_splits - 1));
  WorkCapacity capacity;
  // ceil(cost * target / total) <= 1 + cost * target / total, and the costs sum to the total.
  capacity.work = tiles + extra;
  // Splits of a tile name the same range of work_rows.
  capacity.work_rows = 2 * rows;
  // An agent's first own tile holds at most its uses and its own rows; further tiles and shared
  // tiles at most all Masters. A split cuts one chunk.
  const int64_t own_chunks = uses + agents + full_tiles * (masters + 1);
  capacity.work_chunks = own_chunks + shared_tiles * masters + extra;
  // One of each own chunk. Of a shared one one per row: two uses at least are of its Master and of
  // agents of its tile, and an agent that is cut is in two.
  const int64_t uses_of_tiles = uses + full_tiles * masters;
  capacity.work_uses = own_chunks + std::min(rows * masters, max_tile_rows * uses_of_tiles / 2);
  capacity.partials = std::min(2 * rows * max_splits, 2 * rows + max_tile_rows * extra);
  return capacity;
}

}  // namespace tokendance
