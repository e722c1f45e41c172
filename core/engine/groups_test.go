// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"encoding/json"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/link"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport/fabric"
)

// What link, unlink and query_register_mem_status answer (spec §7.4, §7.5).

// team is a group before it links: its members in the order of their ranks.
type team struct {
	w       *world
	nodes   []*node
	members []GroupMember
	table   string
}

// team starts engines with the cluster ids 1 to n, whose ranks are 0 to n-1.
func (w *world) team(n int, change ...func(*Options)) *team {
	w.t.Helper()
	tm := &team{w: w}
	port := w.rendezvousPort()
	for i := range n {
		id := uint64(i + 1)
		tm.nodes = append(tm.nodes, w.node(fmt.Sprint("host", id), id, append([]func(*Options){func(o *Options) { o.RendezvousPort = port }}, change...)...))
		tm.members = append(tm.members, GroupMember{Cluster: id, Rank: uint32(i)})
	}
	tm.table = tm.tableWith(func(int, map[string]string) {})
	return tm
}

// rendezvousPort is free: 0, the default, in a network of the test's own.
func (w *world) rendezvousPort() uint16 {
	if w.way.fabric {
		return 0
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(w.t, err)
	defer func() { _ = l.Close() }()
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

func (n *node) ip() string {
	if n.host != nil {
		return n.host.IP()
	}
	return "127.0.0.1"
}

// tableWith is the rank table, with each device as change leaves it: server_id and host_ip in it belong to its server.
func (tm *team) tableWith(change func(i int, device map[string]string)) string {
	var servers []any
	for i, n := range tm.nodes {
		device := map[string]string{"device_id": "0", "device_ip": n.ip(), "rank_id": fmt.Sprint(i), "server_id": "a server", "host_ip": ""}
		change(i, device)
		servers = append(servers, map[string]any{"server_id": device["server_id"], "host_ip": device["host_ip"], "device": []any{device}})
	}
	text, err := json.Marshal(map[string]any{"version": "1.0", "status": "completed", "server_count": "1", "server_list": servers})
	require.NoError(tm.w.t, err)
	return string(text)
}

func (tm *team) link(i int, name string) uint64 {
	tm.w.t.Helper()
	comm, err := tm.nodes[i].GroupLink(name, tm.members, tm.table)
	require.NoError(tm.w.t, err)
	return comm
}

func (n *node) state(comm uint64) GroupState {
	n.w.t.Helper()
	state, err := n.GroupStatus(comm)
	require.NoError(n.w.t, err)
	return state
}

// becomes waits until a group has a state.
func (n *node) becomes(comm uint64, want GroupState) {
	n.w.t.Helper()
	n.w.eventually(func() bool { return n.state(comm) != GroupPreparing }, "the preparation ends")
	require.Equal(n.w.t, want, n.state(comm), "%v", n.told())
}

func (n *node) groupUnlink(comm uint64) error {
	ctx, cancel := within(patient)
	defer cancel()
	return n.GroupUnlink(ctx, comm)
}

// requirePulls checks that a pulls what b has, every byte.
func requirePulls(a, b *node) {
	a.w.t.Helper()
	src, dst := b.register(rows(2, 1, 1000)).fill(b.id), a.register(rows(2, 1, 1000)).fill(99)
	require.NoError(a.w.t, a.pull(b, byID(src, 0), dst, all()))
	dst.requireContent(src.content())
	src.remove()
	dst.remove()
}

// requireFailure checks that a group has failed for a reason that the log and Explain of every missing cluster tell.
func requireFailure(n *node, comm uint64, text string, missing ...uint64) {
	n.w.t.Helper()
	n.w.eventually(func() bool { return n.state(comm) == GroupFailed }, "the preparation fails")
	require.True(n.w.t, slices.ContainsFunc(n.told(), func(e link.Event) bool {
		return e.Level == link.Error && e.Cause != nil && strings.Contains(e.Cause.Error(), text)
	}), "the log does not say %q", text)
	for _, id := range missing {
		require.Contains(n.w.t, n.Explain(id), text)
	}
}

func linkTotal(d time.Duration) func(*Options) { return func(o *Options) { o.LinkTotal = d } }

var groupWays = []way{overTCP, overSHM, overFabric, overBubble}

func TestGroupLinksItsMembersInAnyOrder(t *testing.T) {
	for _, order := range [][]int{{0, 1}, {1, 0}, {0, 1, 2}, {2, 1, 0}, {1, 0, 2}, {0, 1, 2, 3}, {3, 1, 2, 0}} {
		t.Run(fmt.Sprint(order), func(t *testing.T) {
			over(t, groupWays, func(w *world) {
				tm := w.team(len(order))
				for k, i := range order {
					require.Equal(w.t, uint64(1), tm.link(i, "group"))
					if k < len(order)-1 {
						require.Equal(w.t, GroupPreparing, tm.nodes[i].state(1))
					}
				}
				for _, n := range tm.nodes {
					n.becomes(1, GroupOK)
				}
				for _, a := range tm.nodes {
					require.Equal(w.t, len(order)-1, a.LiveLinks())
					require.NoError(w.t, a.Remap())
					for _, b := range tm.nodes {
						if a != b {
							requirePulls(a, b)
						}
					}
				}
				for _, n := range tm.nodes {
					require.NoError(w.t, n.groupUnlink(1))
					requireCode(w.t, status.NotYetLink, n.groupUnlink(1))
					require.Zero(w.t, n.LiveLinks())
					requireCode(w.t, status.NotYetLink, n.Remap())
				}
			})
		})
	}
}

func TestSixteenGroupsOfOneProcessAtOnce(t *testing.T) {
	over(t, []way{overTCP, overFabric}, func(w *world) {
		tm := w.team(3)
		const count = 16
		together(count*3, func(k int) {
			_, err := tm.nodes[k%3].GroupLink(fmt.Sprint("group", k/3), tm.members, tm.table)
			require.NoError(w.t, err)
		})
		for _, n := range tm.nodes {
			for comm := range uint64(count) {
				n.becomes(comm+1, GroupOK)
			}
			require.Equal(w.t, 2, n.LiveLinks())
		}
		requirePulls(tm.nodes[0], tm.nodes[2])
	})
}

func TestEnginesOfOneProcessShareTheRendezvousAddress(t *testing.T) {
	over(t, []way{overTCP}, func(w *world) {
		tm := w.team(4)
		pairs := []*team{{w: w, nodes: tm.nodes[:2]}, {w: w, nodes: tm.nodes[2:]}}
		for i, pair := range pairs {
			pair.members = []GroupMember{{Cluster: pair.nodes[0].id}, {Cluster: pair.nodes[1].id, Rank: 1}}
			pair.table = pair.tableWith(func(int, map[string]string) {})
			pair.nodes[1].options.RendezvousPort = tm.nodes[0].options.RendezvousPort
			pair.link(0, fmt.Sprint("pair", i))
		}
		for i, pair := range pairs {
			pair.link(1, fmt.Sprint("pair", i))
			for _, n := range pair.nodes {
				n.becomes(1, GroupOK)
			}
			requirePulls(pair.nodes[0], pair.nodes[1])
		}
	})
}

func TestMissingMemberFailsItsGroupAlone(t *testing.T) {
	over(t, []way{overBubble}, func(w *world) {
		tm := w.team(3, linkTotal(3*time.Second))
		start := time.Now()
		late := []uint64{tm.link(0, "without 3"), 0}
		w.pass(500 * time.Millisecond) // so that rank 0 gives up before rank 1 does
		late[1] = tm.link(1, "without 3")
		pair := &team{w: w, nodes: tm.nodes[:2], members: tm.members[:2], table: tm.table}
		comms := []uint64{pair.link(0, "pair"), pair.link(1, "pair")}
		for i, n := range pair.nodes {
			n.becomes(comms[i], GroupOK)
		}
		require.Less(w.t, time.Since(start), time.Second)
		requireFailure(tm.nodes[0], late[0], "did not announce itself: cluster 3 (rank 2)", 3)
		requireFailure(tm.nodes[1], late[1], "the group did not come together", 3)
		require.Less(w.t, time.Since(start), 4*time.Second)
		requirePulls(tm.nodes[0], tm.nodes[1])
		require.NoError(w.t, tm.nodes[0].groupUnlink(late[0]), "an id outlives the failure")
		require.Equal(w.t, 1, tm.nodes[0].LiveLinks(), "the pair's link is not the failed group's")
	})
}

// What link_clusters has made meanwhile is no part of the preparation.
func TestAFailedGroupLeavesLinksOfOthers(t *testing.T) {
	over(t, []way{overBubble}, func(w *world) {
		tm := w.team(3, linkTotal(3*time.Second))
		comm := tm.link(0, "without the others")
		tm.nodes[1].link(tm.nodes[0])
		tm.nodes[0].link(tm.nodes[2])
		requireFailure(tm.nodes[0], comm, "did not announce itself")
		for _, other := range tm.nodes[1:] {
			requirePulls(tm.nodes[0], other)
		}
	})
}

func TestMembersThatDisagreeFail(t *testing.T) {
	over(t, []way{overBubble}, func(w *world) {
		tm := w.team(2, linkTotal(2*time.Second))
		first := tm.link(0, "group")
		tm.table += " "
		second := tm.link(1, "group")
		requireFailure(tm.nodes[0], first, "cluster 2 announced itself with another map or rank table", 2)
		requireFailure(tm.nodes[1], second, "another map or rank table at rank 0", 1)
		require.Zero(w.t, tm.nodes[0].LiveLinks())
	})
}

func TestMemberThatDiesInMidPreparationGivesItsPlaceToItsSuccessor(t *testing.T) {
	over(t, []way{overBubble, overFabric}, func(w *world) {
		tm := w.team(3)
		tm.link(0, "group")
		tm.link(1, "group")
		w.eventually(func() bool { return link.Seated() == 2 }, "rank 1 has announced itself")
		tm.nodes[1].crash()
		w.eventually(func() bool { return link.Seated() == 1 }, "rank 0 has seen it die")
		tm.nodes[1] = w.node("host2", 2)
		tm.link(1, "group")
		tm.link(2, "group")
		for _, n := range tm.nodes {
			n.becomes(1, GroupOK)
		}
		requirePulls(tm.nodes[2], tm.nodes[1])
	})
}

// Whatever breaks, a preparation ends within its time, and what it leaves is in nobody's way.
func TestGroupsUnderFaultsBySeed(t *testing.T) {
	states := map[GroupState]int{}
	for seed := range uint64(seeds) {
		overBubble.run(t, seed, func(w *world) {
			const total = 10 * time.Second
			tm := w.team(3, func(o *Options) { o.LinkTotal, o.LinkTries = total, 5 })
			w.network.SetFaults(fabric.Faults{
				Latency: 5 * time.Millisecond, Jitter: 50 * time.Millisecond, Loss: 0.1, Tear: 20, CutWithin: 2000, Refuse: 0.3,
			})
			for i := range tm.nodes {
				tm.link(i, "in the storm")
			}
			w.pass(total + 2*time.Second)
			for _, n := range tm.nodes {
				require.NotEqual(w.t, GroupPreparing, n.state(1), "seed %d", seed)
				states[n.state(1)]++
			}
			w.network.SetFaults(fabric.Faults{})
			for _, n := range tm.nodes {
				require.NoError(w.t, n.groupUnlink(1))
			}
			for i := range tm.nodes {
				tm.link(i, "after it")
			}
			for _, n := range tm.nodes {
				n.becomes(2, GroupOK)
			}
			requirePulls(tm.nodes[0], tm.nodes[2])
			requirePulls(tm.nodes[2], tm.nodes[1])
		})
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
	t.Log(states)
	require.Greater(t, min(states[GroupOK], states[GroupFailed]), seeds/4, "a storm that nearly always ends in the same way")
}

func TestTakenRendezvousPortFailsOrIsTriedAgain(t *testing.T) {
	over(t, []way{overBubble}, func(w *world) {
		for _, tries := range []int{1, 4} {
			tm := w.team(2, func(o *Options) { o.LinkTotal, o.LinkTries = 4*time.Second, tries })
			taken, err := tm.nodes[0].parts.Network.Listen(net.JoinHostPort(tm.nodes[0].ip(), "16666"))
			require.NoError(w.t, err)
			comm := tm.link(0, "group")
			if tries == 1 {
				requireFailure(tm.nodes[0], comm, "address already in use", 2)
			} else {
				w.pass(1500 * time.Millisecond)
				require.Equal(w.t, GroupPreparing, tm.nodes[0].state(comm))
			}
			require.NoError(w.t, taken.Close())
			if tries > 1 {
				tm.link(1, "group")
				tm.nodes[0].becomes(comm, GroupOK)
			}
			for _, n := range tm.nodes {
				n.stop()
			}
			w.nodes = nil
		}
	})
}

func TestUnlinkEndsAPreparation(t *testing.T) {
	over(t, groupWays, func(w *world) {
		tm := w.team(3)
		for i := range 2 {
			comm := tm.link(i, "group")
			require.NoError(w.t, tm.nodes[i].groupUnlink(comm))
			_, err := tm.nodes[i].GroupStatus(comm)
			requireCode(w.t, status.NotYetLink, err)
			require.Equal(w.t, uint64(2), tm.link(i, "group"), "ids are not used twice")
		}
		// The engines are closed in mid-preparation.
	})
}

func TestTransfersWaitForTheWholeGroup(t *testing.T) {
	over(t, []way{overFabric}, func(w *world) {
		tm := w.team(2)
		a, b := tm.nodes[0], tm.nodes[1]
		a.link(b)
		comm := tm.link(0, "group")
		requirePulls(a, b) // linked before, and so usable all along
		require.NoError(w.t, a.groupUnlink(comm))
		require.Equal(w.t, 1, a.LiveLinks())
		require.NoError(w.t, a.unlink(b, true))
		w.eventually(func() bool { return b.LiveLinks() == 0 }, "the other end knows")

		comm = tm.link(0, "group")
		a.link(b)
		e := requireCode(w.t, status.NotYetLink, a.pull(b, normal(1), a.register(rows(2, 1, 10)), all()))
		require.Contains(w.t, e.Cause, "being prepared")
		tm.link(1, "group")
		a.becomes(comm, GroupOK)
		requirePulls(a, b)
	})
}

func TestOlderGroupLeavesTheLinkToTheNewer(t *testing.T) {
	over(t, groupWays, func(w *world) {
		tm := w.team(2)
		for comm := range uint64(2) {
			for i := range tm.nodes {
				require.Equal(w.t, comm+1, tm.link(i, fmt.Sprint("group", comm)))
			}
			for _, n := range tm.nodes {
				n.becomes(comm+1, GroupOK)
			}
		}
		for _, n := range tm.nodes {
			require.NoError(w.t, n.groupUnlink(1))
		}
		requirePulls(tm.nodes[0], tm.nodes[1])
		requirePulls(tm.nodes[1], tm.nodes[0])
		require.NoError(w.t, tm.nodes[0].groupUnlink(2))
		require.Zero(w.t, tm.nodes[0].LiveLinks())
		w.eventually(func() bool { return tm.nodes[1].LiveLinks() == 0 }, "the other end knows")
		require.Equal(w.t, GroupOK, tm.nodes[1].state(2), "a state is for good")
		require.NoError(w.t, tm.nodes[1].groupUnlink(2))

		comms := []uint64{tm.link(0, "again"), tm.link(1, "again")}
		for i, n := range tm.nodes {
			n.becomes(comms[i], GroupOK)
		}
		requirePulls(tm.nodes[0], tm.nodes[1])
	})
}

func TestAddressThatIsNotLocalFallsBackToTheServers(t *testing.T) {
	for _, field := range []string{"server_id", "host_ip"} {
		over(t, []way{overTCP, overBubble}, func(w *world) {
			tm := w.team(2)
			tm.table = tm.tableWith(func(i int, device map[string]string) {
				device["device_ip"] = "192.0.2.1" // of no machine
				device[field] = tm.nodes[i].ip()
			})
			tm.link(1, "group")
			tm.link(0, "group")
			for _, n := range tm.nodes {
				n.becomes(1, GroupOK)
			}
			requirePulls(tm.nodes[0], tm.nodes[1])
		})
	}
	over(t, []way{overTCP, overBubble}, func(w *world) {
		tm := w.team(2)
		tm.table = tm.tableWith(func(_ int, device map[string]string) { device["device_ip"] = "192.0.2.1" })
		requireFailure(tm.nodes[0], tm.link(0, "group"), "no address of the own rank is local", 2)
	})
}

func TestSeveralAddressesOfOneHost(t *testing.T) {
	over(t, []way{overTCP, overSHM}, func(w *world) {
		tm := w.team(3)
		tm.table = tm.tableWith(func(i int, device map[string]string) { device["device_ip"] = fmt.Sprint("127.0.0.", i+1) })
		for i := range tm.nodes {
			tm.link(i, "group")
		}
		for _, n := range tm.nodes {
			n.becomes(1, GroupOK)
		}
		l, err := tm.nodes[2].links.Link(2)
		require.NoError(w.t, err)
		require.Contains(w.t, l.Peer().Address, "127.0.0.2:")
		requirePulls(tm.nodes[1], tm.nodes[2])
	})
}

func TestGroupOverIPv6(t *testing.T) {
	if l, err := net.Listen("tcp6", "[::1]:0"); err != nil {
		t.Skip(err)
	} else {
		require.NoError(t, l.Close())
	}
	over(t, []way{overTCP}, func(w *world) {
		tm := w.team(2)
		tm.table = tm.tableWith(func(_ int, device map[string]string) { device["device_ip"] = "::1" })
		for i := range tm.nodes {
			tm.link(i, "group")
		}
		for _, n := range tm.nodes {
			n.becomes(1, GroupOK)
		}
		requirePulls(tm.nodes[0], tm.nodes[1])
	})
}

func TestGroupsThatAreRefused(t *testing.T) {
	over(t, []way{overFabric}, func(w *world) {
		tm := w.team(2)
		n := tm.nodes[0]
		for _, c := range []struct {
			members []GroupMember
			table   string
			code    status.Code
		}{
			{[]GroupMember{{7, 0}, {8, 1}}, tm.table, status.ParamInvalid},
			{[]GroupMember{{1, 0}}, tm.table, status.ParamInvalid},
			{[]GroupMember{{1, 0}, {2, 0}}, tm.table, status.ParamInvalid},
			{tm.members, "", status.LinkFailed},
			{tm.members, "no JSON", status.LinkFailed},
			{tm.members, "[]", status.LinkFailed},
			{tm.members, `{"server_list": 1}`, status.LinkFailed},
			{tm.members, `{"server_list": [{"device": [{"rank_id": 0}]}]}`, status.LinkFailed},
			{tm.members, `{"server_list": [{"device": [{"rank_id": "zero"}]}]}`, status.LinkFailed},
			{tm.members, `{"server_list": [{"device": [{"rank_id": "0"}, {"rank_id": "0"}]}]}`, status.LinkFailed},
			{tm.members, `{"server_list": [{"device": [{"rank_id": "0", "device_id": "65000"}]}]}`, status.LinkFailed},
			{tm.members, `{"version": "2.0"}`, status.LinkFailed},
			{tm.members, strings.Repeat("[", 20_000) + strings.Repeat("]", 20_000), status.LinkFailed},
			{tm.members, `{"super_pod_list": ` + strings.Repeat("[", 20_000) + strings.Repeat("]", 20_000) + "}", status.LinkFailed},
			{tm.members, strings.Repeat(" ", mostRankTable) + "{}", status.LinkFailed},
		} {
			_, err := n.GroupLink("group", c.members, c.table)
			requireCode(w.t, c.code, err)
		}
		for comm, table := range []string{`{}`, `{"server_list":[{"device":[{}]}]}`, `{"server_list":[{"device":[{"rank_id":"0"},{"rank_id":"1"}]}]}`} {
			got, err := n.GroupLink("group", tm.members, table)
			require.NoError(w.t, err)
			require.Equal(w.t, uint64(comm+1), got, "a call that fails takes no id")
			requireFailure(n, got, "rank table", 2)
		}
		_, err := n.GroupStatus(99)
		requireCode(w.t, status.NotYetLink, err)
		requireCode(w.t, status.NotYetLink, n.groupUnlink(99))
	})
}

func TestRankTableOfVersion12(t *testing.T) {
	table, err := parseRankTable(`{"version": "1.2", "status": "completed", "server_count": "1", "server_list": [{"server_id": "10.0.0.9",
		"device": [{"device_id": "3", "super_device_id": "7", "device_ip": "10.0.0.1", "rank_id": "5"}]}],
		"super_pod_list": [{"super_pod_id": "0", "server_list": [{"server_id": "10.0.0.9"}]}]}`)
	require.NoError(t, err)
	place, err := table.at(5)
	require.NoError(t, err)
	require.Equal(t, rankPlace{ips: []string{"10.0.0.1", "10.0.0.9"}, device: 3}, place)
	_, err = table.at(0)
	requireCode(t, status.LinkFailed, err)
}

func TestAtMost512Groups(t *testing.T) {
	over(t, []way{overBubble}, func(w *world) {
		tm := w.team(2)
		for range mostGroups {
			tm.link(1, "group")
		}
		_, err := tm.nodes[1].GroupLink("group", tm.members, tm.table)
		requireCode(w.t, status.ParamInvalid, err)
		require.NoError(w.t, tm.nodes[1].groupUnlink(7))
		require.Equal(w.t, uint64(mostGroups+1), tm.link(1, "group"))
	})
}

func TestDirectionalBackendHasNoGroups(t *testing.T) {
	over(t, []way{overFabric}, func(w *world) {
		tm := w.team(2, directional)
		n := tm.nodes[0]
		_, err := n.GroupLink("group", tm.members, tm.table)
		requireCode(w.t, status.FeatureNotEnabled, err)
		_, err = n.GroupStatus(1)
		requireCode(w.t, status.FeatureNotEnabled, err)
		requireCode(w.t, status.FeatureNotEnabled, n.groupUnlink(1))
	})
}
