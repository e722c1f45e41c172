// SPDX-License-Identifier: Apache-2.0

package link

import (
	"context"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// LinkBack makes a link that leads to this engine itself under the name of another cluster: id is linked at once, without a connection, and
// a is what moves its bytes. It takes a over, also where it fails: AlreadyLink where there is a live link, EngineFinalized after Close.
func (m *Manager) LinkBack(id uint64, a Attached) error {
	err := m.linkBack(id, a)
	if err != nil {
		a.Session.Close(err)
	}
	return err
}

func (m *Manager) linkBack(id uint64, a Attached) error {
	_, end, err := m.begin(context.Background())
	if err != nil {
		return err
	}
	defer end()
	l := &Link{
		manager: m, session: a.Session, transport: a.Transport, dead: make(chan struct{}), gone: make(chan struct{}),
		peer: Peer{ClusterID: id, Incarnation: m.incarnation, Address: a.Transport, Dialed: true, SameHost: true,
			SameHostReason: "the peer is this engine itself"},
	}
	l.peer.link = l
	for {
		old, err := m.installBack(l)
		switch {
		case err != nil:
			return err
		case old == nil:
			l.start()
			return nil
		}
		<-old.gone // it is dead, and ends its operations before its successor serves
	}
}

// installBack enters l under its cluster id, or returns the link that is in its way.
func (m *Manager) installBack(l *Link) (*Link, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.recordOf(l.peer.ClusterID)
	switch {
	case m.closed:
		return nil, status.Newf(status.EngineFinalized, status.StageCheck, "%w", errFinalized)
	case r.link != nil && r.link.lives():
		return nil, status.New(status.AlreadyLink, status.StageCheck, "there is a live link").At(l.peer.ClusterID, l.peer.Address)
	case r.link != nil && !r.link.isGone():
		return r.link, nil
	}
	m.enlist(r, l)
	return nil, nil
}
