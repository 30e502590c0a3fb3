-- What a device measured before anybody said where it stands was measured where it stood first: a backlog that comes
-- after the device was registered belongs to its site, and a move into that time leaves what lies before it there.
ALTER TABLE device_sites NO FORCE ROW LEVEL SECURITY;
UPDATE device_sites h SET valid_from = '-infinity'
    WHERE h.valid_from = (SELECT min(f.valid_from) FROM device_sites f WHERE f.device_id = h.device_id);
ALTER TABLE device_sites FORCE ROW LEVEL SECURITY;
