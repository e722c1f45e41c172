// SPDX-License-Identifier: Apache-2.0

package link

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// back links n to itself as cluster id and returns the session.
func (n *node) back(id uint64) (*fakeSession, error) {
	s := newFakeSession(Peer{ClusterID: id}, nil)
	return s, n.LinkBack(id, Attached{Session: s, Transport: "back"})
}

func TestALinkBackIsALinkWithoutConnections(t *testing.T) {
	check(t)
	n := newNode(t, 1)
	session, err := n.back(2)
	require.NoError(t, err)
	l := n.mustLink(2)
	require.Same(t, session, l.Session())
	require.Equal(t, 1, n.LiveLinks())
	require.Contains(t, n.Explain(2), "transport: back")

	refused, err := n.back(2)
	require.ErrorIs(t, err, status.AlreadyLink)
	require.Error(t, <-refused.closed, "what was refused is closed")

	end := session.work()
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, n.Unlink(ctx, 2, "", false), status.Timeout)
	require.Equal(t, l, n.mustLink(2), "it stays")
	end()
	require.NoError(t, n.unlink(2, "", false))
	require.Error(t, <-session.closed)
	_, err = n.Link(2)
	require.ErrorIs(t, err, status.NotYetLink)
}

func TestALinkBackTakesThePlaceOfADeadOne(t *testing.T) {
	check(t)
	n := newNode(t, 1)
	_, err := n.back(2)
	require.NoError(t, err)
	dead := n.mustLink(2)
	dead.Fail(errors.New("broken"))
	session, err := n.back(2)
	require.NoError(t, err)
	require.True(t, dead.isGone())
	require.Same(t, session, n.mustLink(2).Session())
}

func TestNoLinkBackAfterClose(t *testing.T) {
	check(t)
	n := newNode(t, 1)
	first, err := n.back(2)
	require.NoError(t, err)
	require.NoError(t, n.Close())
	require.Error(t, <-first.closed)
	late, err := n.back(3)
	require.ErrorIs(t, err, status.EngineFinalized)
	require.Error(t, <-late.closed)
}
