-- Named requests of a person who acts for no organisation (yet) stand under nobody's, and are that person's alone.
ALTER TABLE repeats DROP CONSTRAINT repeats_organisation_id_fkey;
DROP POLICY tenant ON repeats;
CREATE POLICY tenant ON repeats TO sluice_app, sluice_owner
    USING (organisation_id = current_organisation()
           OR (organisation_id = '00000000-0000-0000-0000-000000000000' AND caller_id = current_user_id()))
    WITH CHECK (organisation_id = current_organisation()
           OR (organisation_id = '00000000-0000-0000-0000-000000000000' AND caller_id = current_user_id()));
