// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/cache"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// The loopback fabric (spec §13.1). The suite runs over it too, see alsoBack.

// nobody is a cluster that no engine has.
func (w *world) nobody(id uint64) *node {
	return &node{w: w, id: id, address: "127.0.0.1:1", stopped: true}
}

func TestLoopbackLinksToAnyClusterAtOnce(t *testing.T) {
	over(t, []way{overBack}, func(w *world) {
		n, two, three := w.node("n", 9, loopback), w.nobody(2), w.nobody(3)
		require.Contains(w.t, n.told()[0].Text, "open.Fabric is loopback")
		n.link(two)
		n.link(three)
		e := requireCode(w.t, status.AlreadyLink, n.tryLink(two))
		require.Equal(w.t, two.id, e.Peer)
		require.Equal(w.t, 2, n.links.LiveLinks())
		requireCode(w.t, status.ExistLink, n.SwitchRole(""))
		for _, part := range []string{"cluster 2: linked", "transport: loopback"} {
			require.Contains(w.t, n.Explain(2), part)
		}

		require.NoError(w.t, n.unlink(two, false))
		require.NoError(w.t, n.unlink(two, false), "twice is fine")
		require.NoError(w.t, n.unlink(three, true))
		require.Zero(w.t, n.links.LiveLinks())
		require.Contains(w.t, n.Explain(2), "not linked")
		dst := n.register(rows(2, 1, 10))
		requireCode(w.t, status.NotYetLink, n.pull(two, byID(dst, 0), dst, all()))
		require.NoError(w.t, n.SwitchRole(""))
		n.link(two)
		require.NoError(w.t, n.pull(two, byID(dst, 0), dst, all()))
	})
}

func TestLoopbackLeavesTheOtherChecksAsTheyAre(t *testing.T) {
	over(t, []way{overBack}, func(w *world) {
		n, peer := w.node("n", 9, loopback), w.nobody(2)
		ctx, cancel := within(patient)
		defer cancel()
		nowhere := peer.cluster()
		nowhere.Remote = nil
		requireCode(w.t, status.ParamInvalid, n.LinkClusters(ctx, []Cluster{nowhere})[0])
		unnamed := peer.cluster()
		unnamed.ID = nil
		requireCode(w.t, status.LinkFailed, n.LinkClusters(ctx, []Cluster{unnamed})[0])

		n.link(n) // over real sockets
		require.Contains(w.t, n.Explain(9), n.address)
		n.link(peer)
		src := n.allocate(rows(2, 1, 100), two[0]).fill(1)
		dst := n.register(rows(2, 1, 100))
		requireCode(w.t, status.ParamInvalid, n.pull(n, normal(7), dst, all()))
		bad, err := n.Register(rows(2, 1, 100), []uintptr{1, 1}, nil, true)
		require.NoError(w.t, err)
		for _, r := range []struct {
			key   transport.Key
			code  status.Code
			stage status.Stage
		}{
			{normal(6), status.CacheNotExist, status.StageLookup},
			{id(99, 0), status.CacheNotExist, status.StageLookup},
			{id(src.id, 1), status.CacheNotExist, status.StageLookup},
			{transport.Key{Kind: 9}, status.ParamInvalid, status.StageLookup},
			{id(bad, 0), status.ParamInvalid, status.StageTransfer},
		} {
			e := requireCode(w.t, r.code, n.pull(peer, r.key, dst, all()))
			require.Equal(w.t, r.stage, e.Stage)
			require.Equal(w.t, peer.id, e.Peer)
		}
		require.NoError(w.t, n.Unregister(ctx, bad))
		require.NoError(w.t, n.pull(peer, normal(7), dst, all()), "nothing of that has released the key")
		dst.requireContent(src.content())
	})
}

func TestOneSidedLoopbackLooksAtTheFlagOfBothEnds(t *testing.T) {
	over(t, []way{overBack}, func(w *world) {
		owner, puller := w.pair(oneSided)
		open := puller.register(rows(2, 1, 100)).fill(1)
		closed, err := puller.Register(rows(2, 1, 100), puller.malloc(rows(2, 1, 100)), nil, false)
		require.NoError(w.t, err)
		for _, ends := range [][2]int64{{open.id, closed}, {closed, open.id}} {
			ctx, cancel := within(patient)
			err := puller.Pull(ctx, &PullCall{Cluster: owner.id, Key: id(ends[0], 0), Cache: ends[1], Plan: all()})
			cancel()
			requireCode(w.t, status.ParamInvalid, err)
		}
	})
}

func TestThereAre512CommunicatorsAtMost(t *testing.T) {
	over(t, []way{overBack}, func(w *world) {
		n := w.node("n", 3, loopback)
		link := func(peer uint64) error {
			_, err := n.GroupLink("any", []GroupMember{{Cluster: 3, Rank: 0}, {Cluster: peer, Rank: 1}}, `{"server_list":[{"device":[{}]}]}`)
			return err
		}
		for peer := range uint64(mostGroups) {
			require.NoError(w.t, link(100+peer))
		}
		require.Equal(w.t, 512, n.LiveLinks())
		requireCode(w.t, status.ParamInvalid, link(99))
		require.Equal(w.t, 512, n.LiveLinks())
		require.NoError(w.t, n.groupUnlink(17))
		require.NoError(w.t, link(99), "one that was unlinked doesn't count")
		requireCode(w.t, status.ParamInvalid, link(98))
	})
}

// Cache-manager mode has no limit on links: neither on those of one call nor on all (spec §7.6).
func TestOneCallMayLinkMoreClustersThanTheOlderModeHolds(t *testing.T) {
	over(t, []way{overBack}, func(w *world) {
		n := w.node("n", 3, loopback)
		var clusters []Cluster
		for id := range uint64(600) {
			clusters = append(clusters, w.nobody(100+id).cluster())
		}
		ctx, stop := within(patient)
		defer stop()
		for _, err := range n.LinkClusters(ctx, clusters) {
			require.NoError(w.t, err)
		}
		require.Equal(w.t, len(clusters), n.LiveLinks())
	})
}

func TestLoopbackGroupsAreOKAtOnce(t *testing.T) {
	over(t, []way{overBack}, func(w *world) {
		n, peer := w.node("n", 3, loopback), w.nobody(2)
		table := `{"server_list":[{"device":[{}]}]}`
		members := []GroupMember{{Cluster: 3, Rank: 0}, {Cluster: 2, Rank: 1}}
		for want := range uint64(2) {
			comm, err := n.GroupLink("any", members, table)
			require.NoError(w.t, err)
			require.Equal(w.t, want+1, comm)
			state, err := n.GroupStatus(comm)
			require.NoError(w.t, err)
			require.Equal(w.t, GroupOK, state)
		}
		require.Equal(w.t, 1, n.LiveLinks())
		src := n.allocate(rows(2, 1, 100), two[0]).fill(1)
		dst := n.register(rows(2, 1, 100))
		require.NoError(w.t, n.GroupUnlink(w.t.Context(), 1))
		require.NoError(w.t, n.pull(peer, normal(7), dst, all()), "the other group has the link still")
		dst.requireContent(src.content())
		require.NoError(w.t, n.GroupUnlink(w.t.Context(), 2))
		requireCode(w.t, status.NotYetLink, n.pull(peer, byID(src, 0), dst, all()))

		_, err := n.GroupLink("any", members[1:], table)
		requireCode(w.t, status.ParamInvalid, err)
		_, err = n.GroupLink("any", members, "no table")
		requireCode(w.t, status.LinkFailed, err)
	})
}

func TestLoopbackPushes(t *testing.T) {
	for name, change := range map[string][]func(*Options){"two-sided": nil, "one-sided": {oneSided}} {
		t.Run(name, func(t *testing.T) {
			over(t, []way{overBack}, func(w *world) {
				peer, n := w.pair(change...)
				for i, c := range pushCases {
					w.runPush(n, peer, c, uint64(i))
				}
				src := n.register(rows(2, 1, 100))
				e := requireCode(w.t, status.CacheNotExist, n.push(peer, src, toKey(id(99, 0))))
				require.Equal(w.t, peer.id, e.Peer)
				requireCode(w.t, status.ParamInvalid, n.push(n, src, toKey(byID(src, 0))))
				bad, err := n.Register(rows(2, 1, 100), []uintptr{1, 1}, nil, true)
				require.NoError(w.t, err)
				requireCode(w.t, status.ParamInvalid, n.push(peer, src, toKey(id(bad, 0))))
				require.NoError(w.t, n.Unregister(w.t.Context(), bad))
				require.NoError(w.t, n.unlink(peer, false))
				requireCode(w.t, status.NotYetLink, n.push(peer, src, toKey(byID(src, 0))))
			})
		})
	}
}

func TestARealPeerReplacesTheLoopbackLinkOfItsID(t *testing.T) {
	over(t, []way{overBack}, func(w *world) {
		n, real := w.node("n", 9, loopback), w.node("real", 2)
		n.link(real)
		real.register(rows(2, 1, 100), cache.Key{ID: 7}).fill(1)
		dst := n.register(rows(2, 1, 100))
		requireCode(w.t, status.CacheNotExist, n.pull(real, normal(7), dst, all()))
		real.link(n)
		require.NoError(w.t, n.pull(real, normal(7), dst, all()))
		dst.requireContent(real.caches[0].content())
		require.Contains(w.t, n.Explain(2), "transport: tcp")
	})
}

func TestDirectionalLoopback(t *testing.T) {
	over(t, []way{overBack}, func(w *world) {
		n, peer := w.node("n", 9, directional, loopback), w.nobody(2)
		src := n.register(rows(2, 1, 100)).fill(1)
		dst := n.register(rows(2, 1, 100))
		for range 2 {
			n.link(peer)
			requireCode(w.t, status.AlreadyLink, n.tryLink(peer))
			require.NoError(w.t, n.pull(peer, byID(src, 0), dst, all()))
			dst.requireContent(src.content())
			require.NoError(w.t, n.unlink(peer, false))
			requireCode(w.t, status.NotYetLink, n.pull(peer, byID(src, 0), dst, all()))
		}
	})
}

func TestManyPullsOverLoopbackLinksThatComeAndGo(t *testing.T) {
	over(t, []way{overBack}, func(w *world) {
		n := w.node("n", 9, loopback)
		src := n.register(rows(2, 1, 300_000)).fill(1)
		want := src.content()
		together(8, func(i int) {
			peer, dst := w.nobody(uint64(20+i%4)), n.register(rows(2, 1, 300_000))
			for round := range 50 {
				_ = n.tryLink(peer) // or another one has
				err := n.pull(peer, byID(src, 0), dst, all())
				if err == nil {
					dst.requireContent(want)
				} else {
					requireCode(w.t, status.CodeOf(err), err)
					require.Contains(w.t, []status.Code{status.NotYetLink, status.Failed}, status.CodeOf(err))
				}
				if round%3 == 0 {
					require.NoError(w.t, n.unlink(peer, i%2 == 0))
				}
			}
		})
	})
}
