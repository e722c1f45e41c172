// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"net"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/link"
	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// What link_clusters, unlink_clusters and switch_role answer (spec §7.6 to §7.8).

func directional(o *Options) { o.OneSided, o.Directional = true, true }

// requireTold checks that the log has heard of a failure, under the name of the cluster.
func requireTold(n *node, id uint64, code status.Code) (text string) {
	n.w.t.Helper()
	for _, e := range n.told() {
		if e.Cause != nil && status.CodeOf(e.Cause) == code && e.HasClusterID && e.ClusterID == id {
			return e.Text
		}
	}
	require.Fail(n.w.t, "nothing in the log")
	return ""
}

func TestLinkCodes(t *testing.T) {
	over(t, []way{overTCP, overSHM, overFabric}, func(w *world) {
		a, b := w.node("a", 1), w.node("b", 2)
		require.NoError(w.t, a.tryLink(b))
		for _, way := range [][2]*node{{a, b}, {b, a}} {
			e := requireCode(w.t, status.AlreadyLink, way[0].tryLink(way[1]))
			require.Equal(w.t, way[1].id, e.Peer)
			require.Equal(w.t, way[1].address, e.Address)
			requireTold(way[0], way[1].id, status.AlreadyLink)
		}
		require.NoError(w.t, b.unlink(a, false))
		require.NoError(w.t, b.unlink(a, false), "twice is fine")
		require.NoError(w.t, a.unlink(b, true))
		require.NoError(w.t, a.unlink(b, true))
		requireCode(w.t, status.NotYetLink, a.pull(b, normal(7), a.register(rows(2, 1, 10)), all()))
		require.Contains(w.t, a.Explain(2), "not linked")

		other := w.node("other", 3, oneSided)
		for _, way := range [][2]*node{{a, other}, {other, a}} {
			requireCode(w.t, status.ParamInvalid, way[0].tryLink(way[1]))
			requireTold(way[0], way[1].id, status.ParamInvalid)
			w.eventually(func() bool { return strings.Contains(way[1].Explain(way[0].id), "access modes differ") }, "the other end knows too")
		}
		require.Zero(w.t, a.links.LiveLinks()+other.links.LiveLinks())

		require.NoError(w.t, b.SwitchRole(""))
		requireCode(w.t, status.LinkFailed, a.tryLink(b))
		requireTold(a, 2, status.LinkFailed)
		require.Contains(w.t, a.Explain(2), "last failure")
		requireCode(w.t, status.UnlinkFailed, a.unlink(b, false))
		requireTold(a, 2, status.UnlinkFailed)
	})
}

func TestLinkToManyAtOnceReportsEach(t *testing.T) {
	over(t, []way{overTCP, overSHM, overFabric}, func(w *world) {
		a := w.node("a", 1)
		var clusters []Cluster
		want := []status.Code{}
		for i := range uint64(20) {
			b := w.node("peer"+string(rune('a'+i)), 10+i)
			c := b.cluster()
			code := status.Success
			if i%5 == 4 {
				c.Remote, code = nil, status.ParamInvalid
			}
			clusters, want = append(clusters, c), append(want, code)
		}
		ctx, cancel := within(patient)
		defer cancel()
		var got []status.Code
		for _, err := range a.LinkClusters(ctx, clusters) {
			got = append(got, status.CodeOf(err))
		}
		require.Equal(w.t, want, got)
		require.Equal(w.t, 16, a.links.LiveLinks())
		got = nil
		for _, err := range a.UnlinkClusters(ctx, clusters, false) {
			got = append(got, status.CodeOf(err))
		}
		require.Equal(w.t, want, got)
		require.Empty(w.t, a.LinkClusters(ctx, nil))
	})
}

func TestLinkTimesOut(t *testing.T) {
	over(t, []way{overBubble}, func(w *world) {
		a, b := w.node("a", 1), w.node("b", 2)
		b.host.Pause()
		began := time.Now()
		ctx, cancel := within(3 * time.Second)
		defer cancel()
		requireCode(w.t, status.Timeout, a.LinkClusters(ctx, []Cluster{b.cluster()})[0])
		require.Equal(w.t, 3*time.Second, time.Since(began))
		b.host.Resume()
		require.NoError(w.t, a.tryLink(b))
		w.network.Partition(a.host, b.host)
		ctx, cancel = within(time.Second)
		defer cancel()
		requireCode(w.t, status.Timeout, a.UnlinkClusters(ctx, []Cluster{b.cluster()}, false)[0])
		require.Equal(w.t, 1, a.links.LiveLinks(), "the link was not removed")
		w.network.Heal(a.host, b.host)
	})
}

func TestClusterChecks(t *testing.T) {
	over(t, []way{overFabric}, func(w *world) {
		a, b := w.node("a", 1), w.node("b", 2)
		ctx, cancel := within(patient)
		defer cancel()
		try := func(change func(*Cluster)) error {
			c := b.cluster()
			change(&c)
			return a.LinkClusters(ctx, []Cluster{c})[0]
		}
		for _, change := range []func(*Cluster){
			func(c *Cluster) { c.Remote = nil },
			func(c *Cluster) { c.Remote = append(c.Remote, c.Remote[0]) },
			func(c *Cluster) { c.Local = nil },
			func(c *Cluster) { c.Local = []string{"127.0.0.1", "127.0.0.2"} },
		} {
			requireCode(w.t, status.ParamInvalid, try(change))
			require.Equal(w.t, "link refused", requireTold(a, 2, status.ParamInvalid))
		}
		noID := b.cluster()
		noID.ID = nil
		requireCode(w.t, status.ParamInvalid, a.UnlinkClusters(ctx, []Cluster{noID}, false)[0])
		noAddress := b.cluster()
		noAddress.Remote = nil
		requireCode(w.t, status.ParamInvalid, a.UnlinkClusters(ctx, []Cluster{noAddress}, false)[0])
		require.Equal(w.t, "unlink refused", requireTold(a, 2, status.ParamInvalid))
		require.NoError(w.t, a.UnlinkClusters(ctx, []Cluster{noAddress}, true)[0], "by force no address is needed")
		require.NoError(w.t, a.LinkClusters(ctx, []Cluster{noID})[0], "the reported id counts")
		require.Equal(w.t, 1, a.links.LiveLinks())
		require.Contains(w.t, a.Explain(2), "linked")
	})
}

func TestAnotherIDThanTheGivenOneIsAWarning(t *testing.T) {
	over(t, []way{overFabric}, func(w *world) {
		a, b := w.node("a", 1), w.node("b", 2)
		src := b.register(rows(2, 1, 10), two[0]).fill(1)
		dst := a.register(rows(2, 1, 10))
		wrong := uint64(77)
		c := b.cluster()
		c.ID = &wrong
		ctx, cancel := within(patient)
		defer cancel()
		require.NoError(w.t, a.LinkClusters(ctx, []Cluster{c})[0])
		warnings := 0
		for _, e := range a.told() {
			warnings += count(e.Level == link.Warning)
		}
		require.Equal(w.t, 1, warnings)
		call := PullCall{Cluster: wrong, Key: normal(7), Cache: dst.id, Plan: all()}
		requireCode(w.t, status.NotYetLink, a.Pull(ctx, &call))
		require.NoError(w.t, a.pull(b, normal(7), dst, all()))
		dst.requireContent(src.content())
	})
}

func TestLinkToOneself(t *testing.T) {
	over(t, []way{overTCP, overSHM, overFabric}, func(w *world) {
		a := w.node("a", 1)
		require.NoError(w.t, a.tryLink(a))
		dst := a.register(rows(2, 1, 10))
		requireCode(w.t, status.ParamInvalid, a.pull(a, byID(dst, 0), dst, all()))
		require.NoError(w.t, a.unlink(a, false))
		require.Zero(w.t, a.links.LiveLinks())
	})
}

func TestLocalCommRes(t *testing.T) {
	over(t, []way{overFabric}, func(w *world) {
		b := w.node("b", 2)
		for i, c := range []struct {
			text string
			code status.Code
		}{
			{`{"version": "1.0", "server_list": []}`, status.Success},
			{`{"version": "1.2"}`, status.Success},
			{`{"version": "1.3"}`, status.ParamInvalid},
			{`{}`, status.ParamInvalid},
			{`{"version": 1}`, status.ParamInvalid},
			{`not json`, status.ParamInvalid},
			{`{"version": "1.0", "x": "` + strings.Repeat("x", mostCommRes) + `"}`, status.ParamInvalid},
		} {
			a := w.node("a"+string(rune('0'+i)), 10, func(o *Options) { o.LocalCommRes = &c.text })
			cluster := b.cluster()
			cluster.Local = nil // with a resource of one's own no local address is needed
			ctx, cancel := within(patient)
			require.Equal(w.t, c.code, status.CodeOf(a.LinkClusters(ctx, []Cluster{cluster})[0]), "%.40s", c.text)
			cancel()
		}
		empty := ""
		a := w.node("empty", 11, func(o *Options) { o.LocalCommRes = &empty })
		cluster := b.cluster()
		cluster.Local = nil
		ctx, cancel := within(patient)
		defer cancel()
		requireCode(w.t, status.ParamInvalid, a.LinkClusters(ctx, []Cluster{cluster})[0])
	})
}

func TestSwitchRole(t *testing.T) {
	over(t, []way{overTCP, overSHM, overFabric}, func(w *world) {
		a, b := w.pair()
		for _, n := range []*node{a, b} {
			requireCode(w.t, status.ExistLink, n.SwitchRole(""))
			require.Equal(w.t, n.address, n.ListenAddress(), "nothing has changed")
		}
		require.NoError(w.t, a.unlink(b, false))
		require.NoError(w.t, a.SwitchRole("1.2.3.4"+a.address[strings.LastIndex(a.address, ":"):]), "the same port: nothing changes")
		require.Equal(w.t, a.address, a.ListenAddress())
		require.NoError(w.t, a.SwitchRole(""))
		require.NoError(w.t, a.SwitchRole(""))
		require.Empty(w.t, a.ListenAddress())
		require.NoError(w.t, a.SwitchRole(a.address))
		require.NoError(w.t, b.tryLink(a))
		require.NoError(w.t, a.unlink(b, true))
		w.eventually(func() bool { return b.links.LiveLinks() == 0 }, "the link is dead")
		requireCode(w.t, status.Failed, b.SwitchRole("203.0.113.1:1"))
	})
}

func TestDirectionalLinksBelongToTheEndThatMadeThem(t *testing.T) {
	over(t, []way{overTCP, overSHM, overFabric, overDirect}, func(w *world) {
		a, b := w.node("a", 1, directional), w.node("b", 2, directional)
		inA, inB := a.register(rows(2, 1, 50)).fill(1), b.register(rows(2, 1, 50)).fill(2)
		given := uint64(99)
		to := b.cluster()
		to.ID = &given
		ctx, cancel := within(patient)
		defer cancel()
		pull := func(id uint64) error {
			return a.Pull(ctx, &PullCall{Cluster: id, Key: byID(inB, 0), Cache: inA.id, Plan: all()})
		}
		requireCode(w.t, status.NotYetLink, pull(given))
		require.NoError(w.t, a.LinkClusters(ctx, []Cluster{to})[0])
		require.NoError(w.t, pull(given), "the entry is under the caller's id")
		inA.requireContent(inB.content())
		require.Contains(w.t, a.Explain(given), "linked")
		requireCode(w.t, status.NotYetLink, pull(2))
		e := requireCode(w.t, status.NotYetLink, b.pull(a, byID(inA, 0), inB, all()))
		require.NotEmpty(w.t, e.Hint)
		requireCode(w.t, status.AlreadyLink, a.LinkClusters(ctx, []Cluster{to})[0])
		require.NoError(w.t, b.tryLink(a), "the other end links for itself")
		require.NoError(w.t, b.pull(a, byID(inA, 0), inB, all()))

		to.Remote = nil
		require.NoError(w.t, a.UnlinkClusters(ctx, []Cluster{to}, false)[0], "no address is needed")
		require.NoError(w.t, a.UnlinkClusters(ctx, []Cluster{to}, false)[0])
		requireCode(w.t, status.NotYetLink, pull(given))
		require.NoError(w.t, b.pull(a, byID(inA, 0), inB, all()), "the other end's link lives")
	})
}

func TestDirectionalCodes(t *testing.T) {
	over(t, []way{overTCP, overSHM, overFabric}, func(w *world) {
		a, b, other := w.node("a", 1, directional), w.node("b", 2, directional), w.node("other", 3)
		requireCode(w.t, status.ParamInvalid, a.tryLink(other)) // access modes differ
		require.NoError(w.t, b.links.StopListening())
		requireCode(w.t, status.Failed, a.tryLink(b))
		requireTold(a, 2, status.LinkFailed) // the log keeps what the call may not tell apart
		require.NoError(w.t, a.SwitchRole(""), "and it changes nothing")
		require.NotEmpty(w.t, a.ListenAddress())
		requireCode(w.t, status.FeatureNotEnabled, a.SwitchRole("127.0.0.1:1"))
	})
}

func TestDirectionalLinkAfterThePeerHasDied(t *testing.T) {
	over(t, []way{overTCP, overSHM, overFabric}, func(w *world) {
		a, b := w.node("a", 1, directional), w.node("b", 2, directional)
		require.NoError(w.t, a.tryLink(b))
		b.crash()
		w.eventually(func() bool { return a.links.LiveLinks() == 0 }, "the link is dead")
		again := w.node("b", 2, directional)
		require.NoError(w.t, a.tryLink(again))
	})
}

func TestNewEngineListensWhereTheOptionsSay(t *testing.T) {
	check(t)
	options := Options{CacheManager: true, TCPConnections: 1, HasListen: true, ListenIP: "127.0.0.1", ListenPort: "0", HostPool: poolOf(1 << 20)}
	parts := Parts{Device: mem.Host(), Network: TCP()}
	a, err := New(1, options, parts)
	require.NoError(t, err)
	host, port, err := net.SplitHostPort(a.ListenAddress())
	require.NoError(t, err)
	require.Equal(t, "127.0.0.1", host)
	options.ListenPort = port
	_, err = New(2, options, parts)
	requireCode(t, status.Failed, err)
	options.ListenPort = "0"
	b, err := New(2, options, parts)
	require.NoError(t, err)
	id := uint64(1)
	ctx, cancel := within(patient)
	defer cancel()
	require.NoError(t, b.LinkClusters(ctx, []Cluster{{ID: &id, Remote: []string{a.ListenAddress()}}})[0], "a listener needs no local address")
	require.NoError(t, b.Close())
	require.NoError(t, a.Close())
	requireCode(t, status.EngineFinalized, b.LinkClusters(ctx, []Cluster{{ID: &id, Remote: []string{"127.0.0.1:1"}}})[0])

	options.HostPool = poolOf(1 << 62)
	_, err = New(3, options, parts)
	require.Contains(t, []status.Code{status.OutOfMemory, status.ParamInvalid}, status.CodeOf(err))
	options.HostPool, options.TCPConnections = nil, 99
	_, err = New(3, options, parts)
	requireCode(t, status.ParamInvalid, err)
}

func TestARequiredTransportThatThePeerHasNot(t *testing.T) {
	over(t, []way{overFabric}, func(w *world) {
		a, b := w.node("a", 1, func(o *Options) { o.Transport = "tcp" }), w.node("b", 2, func(o *Options) { o.Transport = "shm" })
		requireCode(w.t, status.LinkFailed, a.tryLink(b))
		require.Contains(w.t, a.Explain(2), "shm")
	})
}
