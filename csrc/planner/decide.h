// What a round reuses and what it computes, decided by content: tokendance/host/decide.py says by
// which rules, and turns what it finds here into decisions.
//
// A prompt is a list of places; a place holds a segment. Segments, contexts and Masters are numbers
// here: two segments of one number have one digest, two contexts of one number are one.
//
// Takes time proportional to the places times the shared segments in front of them, whatever the
// number of agents and tokens.
#pragma once

#include <stdint.h>

#include <functional>
#include <vector>

namespace tokendance {

// Where the rows of a place, or of a span, come from; tokendance.host.decide.RowKind in this order.
enum class RowKind : uint8_t { kEarlier, kOwn, kMaster, kExact, kReused, kRepaired };

struct Prompts {
  int64_t num_agents;
  int64_t num_segments;
  const int32_t* place_indptr;    // [N+1]
  const int32_t* segment;         // [places]
  const uint8_t* is_shared;       // [places]
  const int32_t* segment_length;  // [segments] tokens, at least 1
  const int32_t* prefix;          // [N] rows that are the agent's own KV of an earlier round
};

struct MatchInput {
  Prompts prompts;
  const int32_t* exact_prefix;     // [N] <= prefix: rows of it that are exact
  const int32_t* earlier_context;  // [places] of the Master that stands there in the earlier KV, or
                                   // -1
  const uint8_t* agent_computes;   // [N] takes over only what is exact
  const uint8_t* segment_computes;  // [segments] the same, in every prompt
  int64_t num_masters;              // that are stored
  const int32_t* stored;            // [segments] Master, or -1
  const int32_t* stored_rows;       // [segments] rows that it has of the segment
  const int32_t* master_context;    // [masters]
  const uint8_t* master_is_exact;   // [masters]
  const uint8_t* master_has_seen;   // [masters, segments] shared segments left of it
  const uint8_t* known;             // [segments] agents of the round that came before have it
  const uint8_t* replaceable;       // [segments] its Master is one of theirs, and may be replaced
  int32_t shortest;                 // a shorter segment is not shared
  const uint8_t* alone;  // [segments] its Master is computed without a context, by no agent
  bool informed;  // it matters what a Master has seen, so a second agent may make Masters too
  bool lone;      // a shared segment that no other agent has is computed, unless it is `alone`
  // The context `context` followed by a segment. 0 is the empty one.
  std::function<int32_t(int32_t context, int32_t segment)> chain;
};

// A Master that the round makes. Masters are numbered on from those that are stored.
struct MadeMaster {
  int32_t agent;  // -1: alone
  int32_t segment;
  int32_t origin;   // position of its first row
  int32_t context;  // of its first row
  int32_t place;    // of its agent's prompt
  bool is_exact;
};

struct Match {
  std::vector<int32_t> order;  // of the agents: in which they must be computed
  std::vector<MadeMaster> made;
  // By place. kOwn: computed, kMaster: computed as a Master, kExact and kReused: taken over; what
  // of a place is before the agent's prefix is the earlier KV whatever stands here.
  std::vector<RowKind> origin;
  std::vector<int32_t> master;  // -1: none
  std::vector<int32_t> rows;    // of the Master that are used
  // Shared tokens in front that the Master has not seen, at the start of a run; -1: elsewhere.
  std::vector<int32_t> unseen;
  std::vector<int32_t> exact_length;  // [N] rows before the first inexact one
};

Match match_round(const MatchInput& input);

// Spans, uses and own rows of each agent, of what match_round found.
struct Tiling {
  std::vector<int32_t> span_indptr, span_end;
  std::vector<RowKind> span_kind;
  std::vector<int32_t> use_indptr;  // [N+1]
  std::vector<int32_t> use_master, use_delta, use_length;
  std::vector<RowKind> use_kind;
  std::vector<int32_t> mask_indptr;  // [N+1]: pages of the agents' uses
  std::vector<uint32_t> masks;
  std::vector<int32_t> own_indptr, own;  // positions that the agent computes and keeps
};

// repaired: [places] first rows of a use that are computed again. The last row of a prompt is
// computed, whatever stands there: its logits are what the prompt is for.
Tiling tile_round(const Prompts& prompts, const Match& match, const int32_t* repaired,
                  int32_t block_size);

}  // namespace tokendance
