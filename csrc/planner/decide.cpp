#include "planner/decide.h"

#include <algorithm>
#include <limits>
#include <unordered_map>

namespace tokendance {
namespace {

constexpr double kRounding = 1e-6;  // of shares that are compared

// A Master that misses more than this share of what its users have in front is worth making anew.
constexpr double kMissesMuch = 0.25 + kRounding;

// Contexts by what they continue.
class Contexts {
 public:
  explicit Contexts(const std::function<int32_t(int32_t, int32_t)>& chain) : chain_(chain) {}

  int32_t after(int32_t context, int32_t segment) {
    const auto [at, is_new] =
        known_.try_emplace(int64_t{context} << 32 | static_cast<uint32_t>(segment), 0);
    if (is_new) at->second = chain_(context, segment);
    return at->second;
  }

 private:
  const std::function<int32_t(int32_t, int32_t)>& chain_;
  std::unordered_map<int64_t, int32_t> known_;
};

// A context and segments behind it that are put to it when somebody asks.
class LazyContext {
 public:
  void restart(int32_t context) {
    context_ = context;
    behind_.clear();
  }
  void append(int32_t segment) { behind_.push_back(segment); }
  int32_t get(Contexts& contexts) {
    for (const int32_t segment : behind_) context_ = contexts.after(context_, segment);
    behind_.clear();
    return context_;
  }

 private:
  int32_t context_ = 0;
  std::vector<int32_t> behind_;
};

// Who computes which segment, and in which order the agents come.
class MasterAgents {
 public:
  // `wanted`: by agent, the segments that it would share and that are not stored, each once.
  MasterAgents(const Prompts& prompts, const std::vector<std::vector<int32_t>>& wanted)
      : p_(prompts), wanted_(wanted), maker_(prompts.num_segments, -1) {
    agents_of_.resize(p_.num_segments);
    for (int32_t agent = 0; agent < p_.num_agents; ++agent) {
      for (const int32_t segment : wanted_[agent]) agents_of_[segment].push_back(agent);
    }
  }

  // Greedy cover. An agent that covers the most tokens which others want too comes first; then the
  // next, over what is still uncovered. A segment that only one agent wants is computed by that
  // agent, in place. With `informed`, a second agent takes over what take_over says.
  void choose(bool informed) {
    std::vector<int64_t> cover(p_.num_agents, 0);
    std::vector<bool> uncovered(p_.num_segments, false);
    int64_t left = 0;
    for (int64_t segment = 0; segment < p_.num_segments; ++segment) {
      if (agents_of_[segment].size() == 1) maker_[segment] = agents_of_[segment][0];
      if (agents_of_[segment].size() < 2) continue;
      uncovered[segment] = true;
      ++left;
      for (const int32_t agent : agents_of_[segment]) cover[agent] += p_.segment_length[segment];
    }
    std::vector<bool> leads(p_.num_agents, false);
    const auto lead = [&](int32_t agent) {
      std::vector<int32_t> covered;
      for (const int32_t segment : wanted_[agent]) {
        if (!uncovered[segment]) continue;
        uncovered[segment] = false;
        --left;
        maker_[segment] = agent;
        covered.push_back(segment);
        for (const int32_t user : agents_of_[segment]) cover[user] -= p_.segment_length[segment];
      }
      order_.push_back(agent);
      leads[agent] = true;
      return covered;
    };
    while (left > 0) {
      const auto best = std::max_element(cover.begin(), cover.end());
      const int32_t first = static_cast<int32_t>(best - cover.begin());
      const std::vector<int32_t> covered = lead(first);
      if (order_.size() == 1 && informed) {
        const int32_t second = take_over(first, covered);
        if (second >= 0) lead(second);
      }
    }
    for (int32_t agent = 0; agent < p_.num_agents; ++agent) {
      if (!leads[agent]) order_.push_back(agent);
    }
  }

  std::vector<int32_t>& order() { return order_; }
  bool makes(int32_t agent, int32_t segment) const { return maker_[segment] == agent; }

 private:
  // The shared segments of the prompts, each where it first stands.
  class SharedPlaces {
   public:
    explicit SharedPlaces(const Prompts& p) : column_(p.num_segments, -1) {
      const int64_t places = p.place_indptr[p.num_agents];
      for (int64_t place = 0; place < places; ++place) {
        int32_t& column = column_[p.segment[place]];
        if (p.is_shared[place] && column < 0) column = columns_++;
      }
      order_.resize(p.num_agents * columns_, -1);
      context_.resize(order_.size());
      segments_.resize(p.num_agents);
      std::unordered_map<int64_t, int32_t> contexts;
      for (int64_t agent = 0; agent < p.num_agents; ++agent) {
        int32_t left = 0;
        for (int32_t place = p.place_indptr[agent]; place < p.place_indptr[agent + 1]; ++place) {
          const int32_t segment = p.segment[place];
          if (p.is_shared[place] && order(agent, segment) < 0) {
            order_[at(agent, segment)] = static_cast<int32_t>(segments_[agent].size());
            context_[at(agent, segment)] = left;
            segments_[agent].push_back(segment);
          }
          const int32_t next = static_cast<int32_t>(contexts.size()) + 1;
          left = contexts.try_emplace(int64_t{left} << 32 | segment, next).first->second;
        }
      }
    }

    // How many other shared segments stand in front of it; -1: the prompt has none of it.
    int32_t order(int64_t agent, int32_t segment) const { return order_[at(agent, segment)]; }
    // What stands left of it, as a number of these places alone.
    int32_t context(int64_t agent, int32_t segment) const { return context_[at(agent, segment)]; }
    const std::vector<int32_t>& segments(int64_t agent) const { return segments_[agent]; }

   private:
    int64_t at(int64_t agent, int32_t segment) const { return agent * columns_ + column_[segment]; }

    int32_t columns_ = 0;
    std::vector<int32_t> column_;  // by segment, -1: never shared
    std::vector<int32_t> order_, context_;
    std::vector<std::vector<int32_t>> segments_;
  };

  // The agent in whose prompt Masters of the first Master agent would have seen more, which then
  // makes them; -1 if there is none.
  //
  // What a Master never attended to is missing from it, and a repair of its first rows does not
  // bring it back; what it has seen too much does far less harm. Where agents have the segments in
  // orders of their own, the first agent's first segments have seen nothing of what other prompts
  // have in front of them. The other agent's Masters cost their rows once more, whatever the number
  // of siblings: the first agent keeps a copy of its own.
  //
  // A segment is taken over if its users' left contexts are unseen by more than a quarter on
  // average and the other agent brings that down by a third. One that a user has in the first
  // agent's very context, where it is reused exactly, stays.
  int32_t take_over(int32_t first, const std::vector<int32_t>& covered) {
    const SharedPlaces places(p_);
    std::vector<double> gain(p_.num_agents, 0.0);
    std::vector<std::vector<int32_t>> takes(p_.num_agents);
    std::vector<double> weight(p_.num_segments, 0.0);
    std::vector<double> unseen(p_.num_agents, 0.0);  // by the first agent, as a share, of each user
    for (const int32_t segment : covered) {
      const auto is_alike = [&](int32_t agent) {
        return places.context(agent, segment) == places.context(first, segment);
      };
      // Of the users but `first`: the shared tokens in front are, as a share, seen by a maker in as
      // far as the maker has the same segments in front. The shares of all users add up: `weight`.
      std::fill(weight.begin(), weight.end(), 0.0);
      double behind_something = 0, unseen_by_first = 0;
      int64_t users = 0, alike = 0;
      for (const int32_t user : agents_of_[segment]) {
        if (user == first) continue;
        ++users;
        alike += is_alike(user);
        const std::vector<int32_t>& mine = places.segments(user);
        const int32_t count = places.order(user, segment), end = places.order(first, segment);
        int64_t total = 0, missing = 0;
        for (int32_t i = 0; i < count; ++i) {
          const int32_t order = places.order(first, mine[i]), length = p_.segment_length[mine[i]];
          total += length;
          missing += order < 0 || order >= end ? length : 0;
        }
        unseen[user] = 0;
        if (total == 0) continue;
        behind_something += 1;
        unseen[user] = static_cast<double>(missing) / static_cast<double>(total);
        unseen_by_first += unseen[user];
        const double share = 1 / static_cast<double>(total);
        for (int32_t i = 0; i < count; ++i) weight[mine[i]] += p_.segment_length[mine[i]] * share;
      }
      for (const int32_t maker : agents_of_[segment]) {
        if (maker == first || users < 2 || alike - is_alike(maker) > 0) continue;
        // Means over the users but the maker, who has seen all that it has in front.
        const double others = static_cast<double>(users - 1);
        const double now = (unseen_by_first - unseen[maker]) / others;
        if (now <= kMissesMuch) continue;
        const std::vector<int32_t>& mine = places.segments(maker);
        double seen = 0;
        for (int32_t i = 0; i < places.order(maker, segment); ++i) seen += weight[mine[i]];
        const double then = (behind_something - seen) / others;
        if (then > 2.0 / 3.0 * now + kRounding) continue;
        takes[maker].push_back(segment);
        gain[maker] += now - then;
      }
    }
    const double most = *std::max_element(gain.begin(), gain.end());
    if (most <= 0) return -1;
    int32_t best = 0;  // the first of equals
    while (gain[best] < most - kRounding) ++best;
    for (const int32_t segment : takes[best]) maker_[segment] = best;
    return best;
  }

  const Prompts& p_;
  const std::vector<std::vector<int32_t>>& wanted_;
  std::vector<std::vector<int32_t>> agents_of_;  // by segment, ascending
  std::vector<int32_t> maker_;                   // by segment, -1: nobody
  std::vector<int32_t> order_;
};

class Matcher {
 public:
  explicit Matcher(const MatchInput& input) : in_(input), p_(input.prompts), contexts_(in_.chain) {
    const size_t places = p_.place_indptr[p_.num_agents];
    out_.origin.assign(places, RowKind::kOwn);
    out_.master.assign(places, -1);
    out_.rows.assign(places, 0);
    out_.unseen.assign(places, -1);
    out_.exact_length.assign(p_.num_agents, 0);
    made_.assign(p_.num_segments, -1);
    lone_.assign(p_.num_segments, false);
  }

  Match run() {
    find_wanted();
    if (in_.lone) find_lone();
    make_alone();
    MasterAgents masters(p_, wanted_);
    masters.choose(in_.informed);
    out_.order = std::move(masters.order());
    for (const int32_t agent : out_.order) match_agent(agent, masters);
    return std::move(out_);
  }

 private:
  bool may_share(int32_t place) const {
    return p_.is_shared[place] && p_.segment_length[p_.segment[place]] >= in_.shortest;
  }
  bool computes(int32_t agent, int32_t segment) const {
    return in_.agent_computes[agent] || in_.segment_computes[segment];
  }

  void find_wanted() {
    wanted_.resize(p_.num_agents);
    std::vector<int32_t> last(p_.num_segments, -1);  // agent that wants it
    for (int32_t agent = 0; agent < p_.num_agents; ++agent) {
      int64_t begin = 0;
      for (int32_t place = p_.place_indptr[agent]; place < p_.place_indptr[agent + 1]; ++place) {
        const int32_t segment = p_.segment[place];
        if (begin >= p_.prefix[agent] && may_share(place) && in_.stored[segment] < 0 &&
            last[segment] != agent) {
          last[segment] = agent;
          wanted_[agent].push_back(segment);
        }
        begin += p_.segment_length[segment];
      }
    }
  }

  // Segments that one agent of the round has, if there are several agents. A Master that is
  // computed alone carries nothing of another context.
  void find_lone() {
    if (p_.num_agents < 2) return;
    std::vector<int32_t> last(p_.num_segments, -1), users(p_.num_segments, 0);
    for (int32_t agent = 0; agent < p_.num_agents; ++agent) {
      for (int32_t place = p_.place_indptr[agent]; place < p_.place_indptr[agent + 1]; ++place) {
        const int32_t segment = p_.segment[place];
        if (last[segment] != agent) ++users[segment];
        last[segment] = agent;
      }
    }
    for (int64_t segment = 0; segment < p_.num_segments; ++segment) {
      lone_[segment] = users[segment] == 1 && !in_.alone[segment];
    }
  }

  int32_t make(const MadeMaster& master) {
    const int32_t index = static_cast<int32_t>(in_.num_masters + out_.made.size());
    out_.made.push_back(master);
    made_[master.segment] = index;
    made_has_seen_.resize(out_.made.size() * p_.num_segments, 0);
    return index;
  }

  // Those that are computed alone; nobody wants them from an agent then.
  void make_alone() {
    for (int32_t agent = 0; agent < p_.num_agents; ++agent) {
      for (const int32_t segment : wanted_[agent]) {
        if (!in_.alone[segment] || computes(agent, segment) || made_[segment] >= 0) continue;
        make({.agent = -1,
              .segment = segment,
              .origin = 0,
              .context = 0,
              .place = -1,
              .is_exact = true});
      }
    }
    for (std::vector<int32_t>& wanted : wanted_) {
      const auto is_alone = [&](int32_t segment) { return in_.alone[segment] != 0; };
      wanted.erase(std::remove_if(wanted.begin(), wanted.end(), is_alone), wanted.end());
    }
  }

  int32_t context_of(int32_t master) const {
    return master < in_.num_masters ? in_.master_context[master]
                                    : out_.made[master - in_.num_masters].context;
  }
  bool is_exact(int32_t master) const {
    return master < in_.num_masters ? in_.master_is_exact[master] != 0
                                    : out_.made[master - in_.num_masters].is_exact;
  }
  const uint8_t* has_seen(int32_t master) const {
    return master < in_.num_masters
               ? in_.master_has_seen + master * p_.num_segments
               : made_has_seen_.data() + (master - in_.num_masters) * p_.num_segments;
  }

  void match_agent(int32_t agent, const MasterAgents& masters) {
    const int32_t prefix = p_.prefix[agent];
    int32_t begin = 0;
    bool exact = in_.exact_prefix[agent] == prefix;
    out_.exact_length[agent] = in_.exact_prefix[agent];
    LazyContext left;  // all that stands left of the place
    // The context in which the last reused Master was computed, followed by what has come since: a
    // Master of that very context continues a run.
    LazyContext run;
    left_.clear();
    for (int32_t place = p_.place_indptr[agent]; place < p_.place_indptr[agent + 1]; ++place) {
      const int32_t segment = p_.segment[place], length = p_.segment_length[segment];
      if (begin < prefix) {
        if (in_.earlier_context[place] >= 0) run.restart(in_.earlier_context[place]);
      } else if (may_share(place)) {
        if (made_[segment] < 0 && (masters.makes(agent, segment) || replaces(agent, segment))) {
          const int32_t context = left.get(contexts_);
          const int32_t master = make({agent, segment, begin, context, place, exact});
          uint8_t* const seen =
              made_has_seen_.data() + (master - in_.num_masters) * p_.num_segments;
          for (const int32_t other : left_) seen[other] = 1;
          take(place, RowKind::kMaster, master, length);
          run.restart(context);
        } else {
          exact = reuse(agent, place, exact, left, run) && exact;
        }
      }
      begin += length;
      if (exact) out_.exact_length[agent] = begin;
      if (p_.is_shared[place]) left_.push_back(segment);
      left.append(segment);
      run.append(segment);
    }
  }

  // Whether the agent, who joins the round, makes a Master again that one before it has made.
  //
  // As in MasterAgents::take_over, but nobody knows who comes later. The agent itself stands for
  // them in what the Master that is there misses: more than a quarter of what is in front. In what
  // its own Master would miss it cannot. There any order is as likely as any other: both Masters
  // miss what they have not seen of all that the round shares, and the new one must miss half as
  // much.
  bool replaces(int32_t agent, int32_t segment) {
    if (!in_.informed || !in_.replaceable[segment] || in_.alone[segment]) return false;
    if (in_.stored[segment] < 0 || computes(agent, segment)) return false;
    const uint8_t* const seen = has_seen(in_.stored[segment]);
    enum : uint8_t { kElsewhere, kInFront, kCounted };
    where_.assign(p_.num_segments, kElsewhere);
    where_[segment] = kCounted;
    for (const int32_t other : left_) {
      if (where_[other] != kCounted) where_[other] = kInFront;
    }
    int64_t front = 0, front_missed = 0, all = 0, all_missed = 0;
    for (int32_t place = p_.place_indptr[agent]; place < p_.place_indptr[agent + 1]; ++place) {
      const int32_t other = p_.segment[place], length = p_.segment_length[other];
      if (!p_.is_shared[place] || !in_.known[other] || where_[other] == kCounted) continue;
      all += length;
      all_missed += seen[other] ? 0 : length;
      if (where_[other] == kInFront) {
        front += length;
        front_missed += seen[other] ? 0 : length;
      }
      where_[other] = kCounted;
    }
    return static_cast<double>(front_missed) > kMissesMuch * static_cast<double>(front) &&
           2 * (all - front) <= all_missed;
  }

  // Takes a Master over, if there is one that may be; whether the place is exact if all before is.
  bool reuse(int32_t agent, int32_t place, bool exact, LazyContext& left, LazyContext& run) {
    const int32_t segment = p_.segment[place];
    const bool is_made = made_[segment] >= 0;
    const int32_t master = is_made ? made_[segment] : in_.stored[segment];
    if (master < 0) return true;
    const int32_t rows = is_made ? p_.segment_length[segment] : in_.stored_rows[segment];
    const bool same = exact && is_exact(master) && context_of(master) == left.get(contexts_);
    if (!same && (lone_[segment] || computes(agent, segment))) return true;
    take(place, same ? RowKind::kExact : RowKind::kReused, master, rows);
    if (!same && context_of(master) != run.get(contexts_)) {
      const uint8_t* const seen = has_seen(master);
      int32_t unseen = 0;
      for (const int32_t other : left_) unseen += seen[other] ? 0 : p_.segment_length[other];
      out_.unseen[place] = unseen;
    }
    run.restart(context_of(master));
    return same;
  }

  void take(int32_t place, RowKind origin, int32_t master, int32_t rows) {
    out_.origin[place] = origin;
    out_.master[place] = master;
    out_.rows[place] = rows;
  }

  const MatchInput& in_;
  const Prompts& p_;
  Contexts contexts_;
  Match out_;
  std::vector<std::vector<int32_t>> wanted_;
  std::vector<int32_t> made_;  // by segment: its Master, -1: none
  std::vector<uint8_t> made_has_seen_;
  std::vector<bool> lone_;
  std::vector<uint8_t> where_;  // by segment; of one call
  std::vector<int32_t> left_;   // shared segments in front of the place
};

class Tiler {
 public:
  Tiler(const Prompts& prompts, const Match& match, const int32_t* repaired, int32_t block_size)
      : p_(prompts), match_(match), repaired_(repaired), block_size_(block_size) {}

  Tiling run() {
    end_agent();
    for (int32_t agent = 0; agent < p_.num_agents; ++agent) {
      tile(agent);
      end_agent();
    }
    return std::move(out_);
  }

 private:
  void end_agent() {
    const auto size = [](const auto& values) { return static_cast<int32_t>(values.size()); };
    out_.span_indptr.push_back(size(out_.span_end));
    out_.use_indptr.push_back(size(out_.use_master));
    out_.mask_indptr.push_back(size(out_.masks));
    out_.own_indptr.push_back(size(out_.own));
  }

  // Rows from the last end on; none if there are none left.
  void span(int32_t end, RowKind origin) {
    if (end <= end_) return;
    if (origin == RowKind::kOwn || origin == RowKind::kRepaired) {
      for (int32_t position = end_; position < end; ++position) out_.own.push_back(position);
    }
    out_.span_end.push_back(end);
    out_.span_kind.push_back(origin);
    end_ = end;
  }

  void tile(int32_t agent) {
    end_ = 0;
    span(p_.prefix[agent], RowKind::kEarlier);
    int32_t length = 0;
    for (int32_t place = p_.place_indptr[agent]; place < p_.place_indptr[agent + 1]; ++place) {
      length += p_.segment_length[p_.segment[place]];
    }
    int32_t begin = 0;
    for (int32_t place = p_.place_indptr[agent]; place < p_.place_indptr[agent + 1]; ++place) {
      const int32_t end = begin + p_.segment_length[p_.segment[place]];
      if (match_.master[place] >= 0) use(place, begin, end == length);
      span(end, match_.origin[place] == RowKind::kMaster ? RowKind::kMaster : RowKind::kOwn);
      begin = end;
    }
  }

  void use(int32_t place, int32_t begin, bool is_last) {
    const RowKind origin = match_.origin[place];
    const int32_t rows = match_.rows[place];
    out_.use_master.push_back(match_.master[place]);
    out_.use_delta.push_back(begin);
    out_.use_length.push_back(rows);
    out_.use_kind.push_back(origin);
    const size_t page = out_.masks.size();
    out_.masks.resize(page + (rows + block_size_ - 1) / block_size_, 0);
    if (origin == RowKind::kMaster) return;
    const auto replace = [&](int32_t row) {
      out_.masks[page + row / block_size_] |= 1u << row % block_size_;
    };
    const int32_t repaired = std::min(repaired_[place], rows);
    for (int32_t row = 0; row < repaired; ++row) replace(row);
    span(begin + repaired, RowKind::kRepaired);
    const bool has_last = is_last && rows == p_.segment_length[p_.segment[place]];
    span(begin + rows - (has_last ? 1 : 0), origin);
    if (has_last) {
      replace(rows - 1);
      span(begin + rows, RowKind::kRepaired);
    }
  }

  const Prompts& p_;
  const Match& match_;
  const int32_t* repaired_;
  const int32_t block_size_;
  Tiling out_;
  int32_t end_ = 0;  // of the agent's spans so far
};

}  // namespace

Match match_round(const MatchInput& input) { return Matcher(input).run(); }

Tiling tile_round(const Prompts& prompts, const Match& match, const int32_t* repaired,
                  int32_t block_size) {
  return Tiler(prompts, match, repaired, block_size).run();
}

}  // namespace tokendance
